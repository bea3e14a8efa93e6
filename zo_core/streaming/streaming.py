"""Streams blocks through the device: a few arena slots, a prefetch thread, and pending updates.

Outside its block's forward an evicted parameter is NaN, expanded to its shape: shape, dtype and count
are kept, and a stray use gives NaN, never a silently wrong loss. Codes of quantised weights, which have no
NaN, are empty instead, and a stray use is an error.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..exchange import Exchange
from ..noise.changes import flush, together
from ..noise.hashing import used_once
from ..probing.scratch import ALONE, nan
from ..stand_ins import ordinary, same_bits, stand_in
from .copies import Copies, Moment, check_device, with_index
from .shared import Store, share
from .slab import Slab, slab_bytes
from .store import Pending
from .tensor_file import Tensors


def arena_slots(device: torch.device) -> int:
    """Blocks on a device at a time.

    Two are the one in use and the one being fetched: a block is written back while it is in use. On CUDA that would
    make each block wait until the one before it has left, so there is a third slot: one block comes, one is computed
    with, and one goes. On a CPU all three take turns at the same memory, and a slot would only cost some.
    """
    return 3 if device.type == "cuda" else 2


@dataclass(eq=False)
class Block:
    """A module whose parameters are streamed.

    Attributes:
        name: name of the module within the model.
        module: the layer itself.
        holders: parameter objects by their name within the block; several if they share memory.
        state: the rule's state of the parameters (momentum), which is streamed with them, by name; these
            tensors are placeholders, and always NaN.
        pending: updates that were not applied yet; of a shared block also those that are perhaps not stored yet.
        specs: shape and dtype of each streamed tensor, by name, whatever forwards do to the parameter objects.
    """

    name: str
    module: nn.Module
    holders: dict[str, list[Tensor]]
    state: dict[str, Tensor] = field(default_factory=dict)
    pending: Pending = field(default_factory=list)
    specs: dict[str, tuple[torch.Size, torch.dtype]] = field(init=False)

    def __post_init__(self) -> None:
        self.specs = {name: (held[0].shape, held[0].dtype) for name, held in self.holders.items()}

    @property
    def nbytes(self) -> int:
        return sum(shape.numel() * dtype.itemsize for shape, dtype in self.specs.values())

    @property
    def arena_bytes(self) -> int:
        """Bytes that the block takes of an arena slot."""
        return slab_bytes(self.specs)


class Reader(Protocol):
    """Corrects the values of streamed parameters when they are read outside of forwards."""

    def corrected(self, tensor: Tensor, values: Tensor) -> Tensor: ...

    def overwritten(self, tensor: Tensor) -> None: ...


class Streaming:
    """Keeps the blocks of a model in a store, and brings each to the device when it is needed.

    Args:
        blocks: in the order in which a forward is expected to visit them.
        store: holds their values.
        device: where they compute.
    """

    #: The object that streams a module of this process, by the module's ``id``.
    attached: ClassVar[weakref.WeakValueDictionary[int, Streaming]] = weakref.WeakValueDictionary()

    def __init__(self, blocks: list[Block], store: Store, device: torch.device):
        check_device(device)
        device = with_index(device)
        self.blocks, self.store, self.device = blocks, store, device
        self._empty_arenas()
        self.copies = Copies(device)
        self.fetching: dict[Block, Future[Moment]] = {}
        self.writing: dict[Block, Future[Moment]] = {}
        self.following = dict(zip(blocks, [*blocks[1:], blocks[0]], strict=True))
        self.previous: Block | None = None
        self.bytes_read = self.bytes_written = 0
        self.handles: list[Any] = []
        self.sweeping = False
        self.reader: Reader | None = None
        #: Parameters that were read outside of a forward, with the values that they have shown since.
        self.read: OrderedDict[tuple[Block, str], Tensor] = OrderedDict()
        self.pinned: dict[Block, int] = {}
        self._home = {id(t): (block, name) for block in blocks for name, ts in block.holders.items() for t in ts}
        self._absent = self._all_absent()
        for block in blocks:
            self.evict_view(block)
            self._attach(block)
            self.attached[id(block.module)] = self

    def _all_absent(self) -> dict[tuple[Block, str], Tensor]:
        # Each has its own memory, so that parameters that share none do not seem to be tied.
        pairs = ((block, name) for block in self.blocks for name in block.holders)
        return {(block, name): nan(*block.specs[name], self.device) for block, name in pairs}

    def compute_on(self, device: torch.device) -> None:
        """Streams blocks to another device from now on; the caller moves what is resident.

        Raises:
            ConfigError: blocks cannot be streamed to the device.
            StateError: a block could not be read or written.
        """
        check_device(device)
        self.flush()
        for block in self.blocks:
            self.settle(block)
        self.copies.close()
        device = with_index(device)
        self.device, self.copies, self.previous = device, Copies(device), None
        self._empty_arenas()
        self._absent = self._all_absent()
        for block in self.blocks:
            for key, token in block.state.items():
                token.data = nan(*block.specs[key], device)
            self.evict_view(block)

    @classmethod
    def of(cls, model: nn.Module) -> Streaming | None:
        """The object that streams the blocks of a model; None if they are resident."""
        return next((cls.attached[id(m)] for m in model.modules() if id(m) in cls.attached), None)

    def keep_state(self, block: Block, key: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Adds a tensor of zeros to a block, for a rule's state of a parameter, or resets an existing one to zero.

        Args:
            block: the block.
            key: name of the tensor within the block.
            shape: shape of the tensor.
            dtype: dtype of the tensor.

        Returns:
            A placeholder of this shape and dtype: NaN on the device, in the memory of one element.

        Raises:
            StateError: a block could not be read or written.
        """
        if key in block.state:
            self.load_state(block, {key: None})
        else:
            for other in self.blocks:
                self._finish(other)
            self._part(block)
            self.store.add_zeros(block.name, key, shape, dtype)
            block.state[key] = nan(shape, dtype, self.device)
            block.specs[key] = shape, dtype
            self._empty_arenas()
        return block.state[key]

    def same_as(self, block: Block, key: str, name: str) -> bool:
        """Lets a tensor of `keep_state` have what a parameter has now, without storing it again, if that is possible.

        Args:
            block: the block.
            key: the tensor, which is not to change from now on.
            name: the parameter; it may change.

        Returns:
            Whether it is possible. A copy of the block that was fetched before does not have it.

        Raises:
            StateError: an earlier read or write of the block has failed.
        """
        self.settle(block)
        self._finish(block)
        return self.store.same_as(block.name, key, name)

    def state(self, block: Block, key: str) -> Tensor:
        """A stored tensor of a block, on the CPU; do not write to it. Pending updates of own blocks are not included.

        Args:
            block: the block.
            key: name of the tensor within the block: a parameter, or a key of `keep_state`.

        Raises:
            StateError: an earlier read or write of the block has failed.
        """
        return self.stored(block)[key]

    def stored(self, block: Block) -> Tensors:
        """All stored tensors of a block by name, as from `state`."""
        if self.store.shares(block.name):
            self._complete(block)
        self._finish(block)
        return self.store.mapped(block.name)

    def load_state(self, block: Block, values: dict[str, Tensor | None]) -> None:
        """Stores new values for some tensors of a block, after applying its pending updates.

        Args:
            block: the block.
            values: by name within the block (parameters, or keys of `keep_state`): tensors of the stored
                shapes, which are cast to the stored dtypes, or None for zeros.

        Raises:
            StateError: the block could not be read. If the write in the background fails, the next use of
                the block raises.
        """
        self._part(block)
        tensors = self.values(block)
        self._after_write(block)
        for key, value in values.items():
            tensors[key].zero_() if value is None else tensors[key].copy_(value)
        self._write_back(block, tensors, set(values))

    def _attach(self, block: Block) -> None:
        """Hooks for use outside of sweeps: forwards (evaluation, generation) fetch their block; states are whole."""
        module = block.module
        self.handles += [
            module.register_forward_pre_hook(lambda *_: None if self.sweeping else self.open(block), prepend=True),
            module.register_forward_hook(lambda *_: None if self.sweeping else self.shut(block), always_call=True),
            module.register_state_dict_pre_hook(lambda *_: self._show_whole(block, to_read=True)),
            module.register_state_dict_post_hook(lambda *_: self.evict_view(block)),
            module.register_load_state_dict_pre_hook(lambda *_: self._show_whole(block, to_read=False)),
            module.register_load_state_dict_post_hook(lambda *_: self._take_whole(block)),
        ]

    def _show_whole(self, block: Block, to_read: bool) -> None:
        self.settle(block)
        self._complete(block)
        if not to_read:
            self._part(block)
            self.copies.drain()  # a forward that is queued may still have to fetch what is about to be overwritten
        self.point(block, self.store.mapped(block.name) if to_read else self.store.whole(block.name))

    def _take_whole(self, block: Block) -> None:
        kept = self.store.mapped(block.name)
        values = {name: tensors[0].data for name, tensors in block.holders.items()}
        self.store.put(block.name, values | {name: kept[name] for name in block.state})
        if block in self.loaded:
            self.arenas.append(self.loaded.pop(block)[0])
        self.evict_view(block)

    def home(self, tensors: Sequence[Tensor]) -> tuple[Block, str] | None:
        """The block that a parameter is streamed with, and its name within the block; None if it is resident."""
        return next((self._home[id(tensor)] for tensor in tensors if id(tensor) in self._home), None)

    def _empty_arenas(self) -> None:
        """Drops all slots; they are made when they are needed, as each tensor of momentum makes them larger."""
        self.slots = min(arena_slots(self.device), len(self.blocks))
        self.arenas: list[Tensor] = []
        self.loaded: OrderedDict[Block, tuple[Tensor, Tensors]] = OrderedDict()
        self._carved: dict[tuple[object, ...], Tensors] = {}

    @property
    def slot_bytes(self) -> int:
        """Size of an arena slot, in bytes."""
        return max(block.arena_bytes for block in self.blocks)

    def _arena(self) -> Tensor:
        with torch.inference_mode(False):
            return self.copies.lend(torch.empty(self.slot_bytes, dtype=torch.uint8, device=self.device))

    # Views

    def values(self, block: Block) -> Tensors:
        """The block's tensors on the device, fetched if necessary, and with pending updates applied.

        Also starts to fetch the blocks that are expected next.

        Args:
            block: the block.

        Returns:
            By name within the block, parameters and state with the shapes and dtypes of `Block.specs`. They are
            views of an arena slot, valid until another block is fetched into it.

        Raises:
            StateError: a block could not be read, or an earlier write has failed.
        """
        self.settle(block)
        if block not in self.loaded:
            self._start_fetch(block)
        self.loaded.move_to_end(block)
        if block in self.fetching:
            with self._or_not_loaded(block):
                self.copies.let_wait(self.fetching.pop(block))
        tensors = self.loaded[block][1]
        if self.previous is not block:
            if self.previous is not None:
                self.following[self.previous] = block
            self.previous = block
            self._prefetch(block)
        if block.pending:  # after the prefetch, which has to wait for what is queued on the device by then
            self._apply(block, tensors)
        return tensors

    def open(self, block: Block, only: Iterable[str] | None = None) -> None:
        """Fetches a block, and points its parameters at their values until `shut`.

        Args:
            block: the block.
            only: names within the block; None for all parameters.

        Raises:
            StateError: a block could not be read, or an earlier write has failed.
        """
        tensors = self.values(block)
        self.pinned[block] = self.pinned.get(block, 0) + 1
        self.point(block, tensors, only)

    def shut(self, block: Block, only: Iterable[str] | None = None) -> None:
        """Undoes `open`; after as many calls as to `open`, the parameters show NaN again."""
        if block not in self.pinned:
            return  # it could not be fetched
        self.pinned[block] -= 1
        if not self.pinned[block]:
            del self.pinned[block]
            self.evict_view(block, only)

    def point(self, block: Block, tensors: Tensors, only: Iterable[str] | None = None) -> None:
        """Points the parameters at ``tensors``, without a copy.

        Args:
            block: the block.
            tensors: by name within the block, tensors of the parameters' shapes and dtypes.
            only: names within the block; None for all parameters.
        """
        for name in block.holders if only is None else only:
            for holder in block.holders[name]:
                ordinary(holder)
                holder.data = tensors[name]
        torch.clear_autocast_cache()

    def evict_view(self, block: Block, only: Iterable[str] | None = None) -> None:
        """Points the parameters at NaN; outside of sweeps, reading them brings their values."""
        for name in block.holders if only is None else only:
            for holder in block.holders[name]:
                ordinary(holder)
                holder.data = self._absent[block, name]
                if not self.sweeping:
                    stand_in(holder, partial(self._bring, block, name))
        torch.clear_autocast_cache()

    # Parameters that are read outside of forwards

    @contextmanager
    def sweep(self) -> Iterator[None]:
        """A context in which parameters outside of their block's forward are NaN for all readers."""
        for block in self.blocks:
            self.settle(block)
        self.sweeping = True
        for block in self.blocks:
            self.evict_view(block)
        try:
            yield
        finally:
            self.sweeping = False
            for block in self.blocks:
                self.evict_view(block)

    def _bring(self, block: Block, name: str) -> None:
        """Called when a parameter is read: gives it its values until its block is fetched or the memory is needed."""
        self._complete(block)
        self._make_room(block)
        values = self._stored(block, name)
        self.read[block, name] = values
        for holder in block.holders[name]:
            ordinary(holder)
            holder.data = values

    def _stored(self, block: Block, name: str) -> Tensor:
        """A parameter's values in memory of their own."""
        values = self.store.mapped(block.name)[name].to(self.device, copy=True)
        return values if self.reader is None else self.reader.corrected(block.holders[name][0], values)

    def _make_room(self, block: Block) -> None:
        """Drops the values of parameters of other blocks that were read, unless something still references them."""
        for key, values in list(self.read.items()):
            holders = key[0].holders[key[1]]
            alone = ALONE + len(holders)  # the parameters, this object, and the query itself
            if key[0] is not block and torch._C._storage_Use_Count(values.untyped_storage()._cdata) <= alone:
                self._settle(*key)

    def settle(self, block: Block) -> None:
        """Drops the values of a block's parameters that were read; values changed since then go to the store.

        Raises:
            StateError: changed values could not be stored.
        """
        for key in [key for key in self.read if key[0] is block]:
            self._settle(*key)

    def _settle(self, block: Block, name: str) -> None:
        if self.read.pop((block, name), None) is None:  # storing another one of the block has settled all
            return
        with torch.no_grad(), torch.inference_mode(False), torch.DisableTorchFunction():
            now = block.holders[name][0].data
            if not same_bits(now, self._stored(block, name)):
                if self.reader is not None:
                    self.reader.overwritten(block.holders[name][0])
                self.load_state(block, {name: now})
            self.evict_view(block, [name])

    # Movement

    def _prefetch(self, block: Block) -> None:
        """Starts to fetch the blocks that are expected after this one, as far as there are slots for them."""
        wanted = [block]
        while len(wanted) < self.slots:
            upcoming = self.following[wanted[-1]]
            # A weight that is used within another block's forward leaves no slot to spare: that block's is taken, too.
            if upcoming in wanted or not (upcoming in self.loaded or self._room(wanted)):
                break
            if upcoming not in self.loaded:
                self._start_fetch(upcoming, wanted)
            wanted.append(upcoming)
        self.loaded.move_to_end(block)

    def _room(self, wanted: Sequence[Block]) -> bool:
        return bool(self.arenas) or len(self.loaded) < self.slots or self._oldest(wanted) is not None

    def _oldest(self, wanted: Sequence[Block] = ()) -> Block | None:
        """The block in a slot that has not been used for longest, and can do without."""
        return next((b for b in self.loaded if b not in self.pinned and b not in wanted), None)

    def _start_fetch(self, block: Block, wanted: Sequence[Block] = ()) -> None:
        """Fetches a block into a slot of its own, that of another block if it has to be, but of none in ``wanted``."""
        after: list[Moment] = []
        if not self.arenas:
            full = len(self.loaded) >= self.slots
            oldest = self._oldest(wanted) if full else None
            if oldest is None:
                self.arenas.append(self._arena())
            else:
                after += self._moments(oldest)
                self.arenas.append(self.loaded.pop(oldest)[0])
        after.append(self.copies.now())  # work that is queued on the device may still use the slot, or had its memory
        arena = self.arenas.pop()
        layout = (id(arena), *block.specs.items())  # a model has few, and arenas live as long as these views
        tensors = self._carved.get(layout)
        if tensors is None:
            tensors = self._carved[layout] = Slab(arena, block.specs)
        self.loaded[block] = (arena, tensors)
        after += self._moments(block)
        nbytes = block.nbytes
        self.bytes_read += nbytes
        read = partial(self.store.read, block.name, tensors)
        with self._or_not_loaded(block):
            self.fetching[block] = self.copies.fetch(read, after, here=self.store.returns_soon(nbytes))

    @contextmanager
    def _or_not_loaded(self, block: Block) -> Iterator[None]:
        """A context that fetches a block; if that fails, its slot is free again."""
        try:
            yield
        except BaseException as error:
            arena = self.loaded.pop(block)[0]
            if isinstance(error, Exception):  # else the fetch was interrupted, and may still write there
                self.arenas.append(arena)
            raise

    def _moments(self, block: Block) -> list[Moment]:
        """The moments at which the copies in progress for a block are done."""
        return [futures[block].result() for futures in (self.fetching, self.writing) if block in futures]

    def _finish(self, block: Block) -> None:
        """Waits for the copies in progress for a block."""
        if block in self.fetching:
            with self._or_not_loaded(block):
                self.copies.wait(self.fetching.pop(block))
        if block in self.writing:
            self.copies.wait(self.writing.pop(block))

    def _after_write(self, block: Block) -> None:
        """Orders what follows after the write of a block in progress, which reads the block's slot."""
        if block in self.writing:
            self.copies.let_wait(self.writing.pop(block))

    def later(self, block: Block, names: tuple[str, ...], update: Callable[[Tensors], None]) -> None:
        """Changes a block when it is fetched next.

        Args:
            block: the block.
            names: the tensors that change.
            update: changes them in place, given all tensors of the block by name. If the block is shared, it may be
                called several times, each time with values from before it.
        """
        if self.store.shares(block.name):
            self.settle(block)  # from now on others may store the update
        block.pending.append((names, update))
        self.store.queued(block.name, block.pending)

    def _apply(self, block: Block, tensors: Tensors) -> None:
        due = self.store.due(block.name, block.pending)
        if not due:
            return
        self._after_write(block)
        changed: set[str] = set()
        try:
            with used_once(), together():
                for names, update in due:
                    if changed.intersection(names):  # an update may read what it changes by any means
                        flush()
                    changed.update(names)
                    update(tensors)
        except BaseException:
            if self.store.shares(block.name):
                self.arenas.append(self.loaded.pop(block)[0])  # half of the updates must not be applied again
            raise
        self.store.note_applied(block.name, block.pending)
        self._write_back(block, tensors, changed.union(*(names for names, _ in block.pending)))

    def _complete(self, block: Block) -> None:
        """Applies the pending updates of a block and waits until they are stored.

        Raises:
            StateError: the block could not be read or written.
            RanksError: another process that shares the block does not come to the same step.
        """
        if block.pending:
            self.values(block)
        self._finish(block)
        while not self.store.complete(block.name, block.pending):
            tensors = self.values(block)
            self._write_back(block, tensors, set[str]().union(*(names for names, _ in block.pending)))
            self._finish(block)

    def _part(self, block: Block) -> None:
        """Gives this process a copy of its own of a shared block, which is about to change otherwise than by a step."""
        if self.store.shares(block.name):
            tensors = self.values(block)
            self._finish(block)
            self.store.part(block.name, tensors)
            block.pending.clear()

    def keep_own(self) -> None:
        """Gives this process copies of its own of all blocks that it shares."""
        for block in self.blocks:
            self._part(block)

    def share(self, exchange: Exchange) -> None:
        """Shares the blocks with the other processes of this host; see `shared.share`. Nothing may be pending."""
        for block in self.blocks:
            self._finish(block)
        self.store = share(self.store, {block.name: block.specs for block in self.blocks}, exchange)

    def _write_back(self, block: Block, tensors: Tensors, changed: set[str]) -> None:
        self._after_write(block)
        nbytes = block.nbytes
        self.bytes_written += nbytes
        write = partial(self.store.write, block.name, tensors, changed)
        here = self.store.returns_soon(nbytes)
        self.writing[block] = self.copies.send(write, [self.copies.now()], here=here)

    def flush(self) -> None:
        """Applies all pending updates and waits until they are stored.

        Raises:
            StateError: a block could not be read or written.
        """
        for block in self.blocks:
            if block.pending:
                self.values(block)
        for block in self.blocks:
            self._complete(block)

    def rest(self) -> None:
        """Stores everything, also what users have written into parameters."""
        for block in self.blocks:
            self.settle(block)
        self.flush()

    def close(self, device: torch.device | None = None) -> None:
        """Flushes, makes the parameters ordinary tensors again, and ends the thread.

        Args:
            device: where the parameters go; None takes the device that they computed on.

        Raises:
            StateError: a block could not be read or written.
        """
        self.flush()
        device = self.device if device is None else device
        for block in self.blocks:
            self.settle(block)
            self.point(block, {name: tensor.to(device) for name, tensor in self.store.whole(block.name).items()})
            self.attached.pop(id(block.module), None)  # a call before this one may have failed half-way
        self.store.leave()
        self.copies.close()
        for handle in self.handles:
            handle.remove()
