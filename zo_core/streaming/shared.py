"""Blocks that the processes of a host have in common: one copy in host memory, or one set of files.

All processes compute the same updates, so any of them may write a block, and the others skip what it has already had.
For each block there is a number beside it: how many updates its values have had. A process that fetches the block
applies the updates that it has queued from that number on, and offers the result. It is stored unless another process
has already done so, and only when no process is behind: the stored values are never ahead of anyone.

What else changes a block, such as a state dict that is loaded, is a matter of one process: it goes on with a copy of
its own, until the processes agree again that they hold the same weights.
"""

from __future__ import annotations

import logging
import mmap
import os
import shutil
import weakref
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import ConfigError, StateError
from ..exchange import Exchange
from .board import GONE, Board, host, mapped_memory, new_memory, open_memory
from .slab import Specs, slab_bytes
from .store import DiskStore, Pending, RamStore
from .tensor_file import Piece, Tensors

logger = logging.getLogger(__name__)

#: Shapes and dtypes of the tensors of each block.
Layouts = Mapping[str, Specs]


class SharedStore:
    """A store of which some blocks are in common with other processes of the host.

    Args:
        own: has the blocks of this process alone.
        common: has the others.
        board: numbers and locks of the common blocks.
        index: the place on the board of each common block.
        folder: of temporary files, which the last process removes; None if there are none.

    Attributes:
        applied: how many updates the values have had that were read last.
        first: number of the oldest pending update.
    """

    def __init__(
        self,
        own: RamStore | DiskStore,
        common: RamStore | DiskStore,
        board: Board,
        index: dict[str, int],
        folder: Path | None = None,
    ):
        self.own, self.common, self.board, self.index, self.folder = own, common, board, index, folder
        self.applied, self.first, self._seen = (dict.fromkeys(index, 0) for _ in range(3))
        self.end = weakref.finalize(self, _leave, board, folder, os.getpid())

    def _of(self, block: str) -> RamStore | DiskStore:
        return self.common if block in self.index else self.own

    # What is in common

    def shares(self, block: str) -> bool:
        return block in self.index

    def queued(self, block: str, pending: Pending) -> None:
        if block in self.index:
            self.board.publish(self.index[block], self.first[block] + len(pending))

    def due(self, block: str, pending: Pending) -> Pending:
        if block not in self.index:
            return self.own.due(block, pending)
        had = min(self.board.stored(self.index[block]), self.applied[block]) - self.first[block]
        del pending[:had]
        self.first[block] += had
        return pending[self.applied[block] - self.first[block] :]

    def note_applied(self, block: str, pending: Pending) -> None:
        if block in self.index:
            self.applied[block] = self.first[block] + len(pending)

    def complete(self, block: str, pending: Pending) -> bool:
        if block not in self.index:
            return True
        place, number = self.index[block], self.first[block] + len(pending)
        with self.board.reading(place):
            if self.board.stored(place) >= number:
                self.first[block] = number
                pending.clear()
                return True
        self.board.wait(place, number)
        return False

    def part(self, block: str, tensors: Tensors) -> None:
        """Makes a copy for this process alone.

        Args:
            block: a common block.
            tensors: all of its tensors, with all updates.
        """
        self.own.put(block, {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()})
        self.board.publish(self.index.pop(block), GONE)

    def leave(self) -> None:
        """Ends the use of common blocks."""
        self.end()

    def retire(self) -> Path | None:
        """Makes room for another store with the same common files; returns the folder that that one has to remove."""
        self.end.detach()
        self.board.leave()
        return self.folder

    # As any store

    def put(self, block: str, tensors: Tensors) -> None:
        self._of(block).put(block, tensors)

    def add_zeros(self, block: str, name: str, shape: torch.Size, dtype: torch.dtype) -> None:
        self._of(block).add_zeros(block, name, shape, dtype)

    def same_as(self, block: str, key: str, name: str) -> bool:
        # Of a common block another process may have changed the other tensor already.
        return block not in self.index and self.own.same_as(block, key, name)

    def returns_soon(self, nbytes: int) -> bool:
        # Registered memory is copied by a thread, too, which waits for the end of the copy before it gives up the lock.
        return not (isinstance(self.common, RamStore) and self.common.pinned) and self.common.returns_soon(nbytes)

    def read(self, block: str, into: Tensors) -> None:
        if block not in self.index:
            self.own.read(block, into)
            return
        _settled(into)
        with self.board.reading(self.index[block]):
            self._look(block)
            self.common.read(block, into)
            _settled(into)
            self.applied[block] = self.board.stored(self.index[block])

    def write(self, block: str, tensors: Tensors, changed: Collection[str]) -> None:
        """Stores a block unless another process has, or one could still need the values from before."""
        if block not in self.index:
            self.own.write(block, tensors, changed)
            return
        place, number = self.index[block], self.applied[block]
        if self.board.stored(place) >= number or self.board.lagging(place, number):
            return
        _settled(tensors)
        with self.board.writing(place, number) as needed:
            if not needed:
                return
            self._look(block)  # what another process has changed is in its file, and no more where it was
            try:
                self.common.write(block, tensors, changed)
            except StateError:
                self.board.unharmed(place)  # the file from before is whole
                raise
            _settled(tensors)

    def whole(self, block: str) -> Tensors:
        """The block's tensors; of a common block, a copy."""
        if block not in self.index:
            return self.own.whole(block)
        with self.board.reading(self.index[block]):
            self._look(block)
            found = self.common.whole(block)
            return {name: tensor.clone() for name, tensor in found.items()} if self.common.in_place else found

    def mapped(self, block: str) -> Tensors:
        """The stored tensors themselves, of a common block with all queued updates."""
        if block in self.index:
            self._look(block)
        return self._of(block).mapped(block)

    def _look(self, block: str) -> None:
        """Finds the file that another process may have written."""
        now = self.board.stored(self.index[block])
        if now != self._seen[block] and isinstance(self.common, DiskStore):
            self.common.look(block)
        self._seen[block] = now


def _settled(tensors: Tensors) -> None:
    """Waits for copies of a CUDA device, which are only enqueued."""
    for tensor in tensors.values():
        if tensor.device.type == "cuda":
            torch.cuda.current_stream(tensor.device).synchronize()
        return


def _leave(board: Board, folder: Path | None, process: int) -> None:
    # A fork has the locks of its parent, and must not give them up when it ends.
    if os.getpid() == process and board.leave() and folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


Store = RamStore | DiskStore | SharedStore

# Agreeing on what is in common


class Facts(NamedTuple):
    """What a process says about its blocks; processes of one host whose blocks are alike share them."""

    host: tuple[str, int, int] | None
    kind: type[RamStore] | type[DiskStore]
    layouts: dict[str, list[tuple[str, torch.Size, torch.dtype]]]
    common: frozenset[str]


class Offer(NamedTuple):
    """Where a process has put the blocks that are not in common yet.

    Attributes:
        process: its id.
        board: its file of the board.
        folder: of the common files; None for host memory.
        temporary: whether the folder has to be removed at the end.
        blocks: for each block the file of its memory, or where its tensors are in files.
    """

    process: int
    board: int
    folder: Path | None
    temporary: bool
    blocks: dict[str, Any]


def share(store: Store | None, layouts: Layouts, exchange: Exchange) -> Any:
    """Makes the processes of each host use one copy of their blocks, which have the same values in all of them.

    All processes of the run have to call it, with nothing pending. Where it is not possible, each process keeps its
    own copy, and a line of log says why.

    Args:
        store: has the blocks of this process; None if it streams none.
        layouts: of each of its blocks.
        exchange: between the processes of the run.

    Returns:
        The store to use from now on.
    """
    facts: list[Facts | None] = exchange.everywhere(None if store is None else _facts(store, layouts))
    mine = facts[exchange.rank]
    group = [rank for rank, each in enumerate(facts) if mine and each and mine.host and each[:2] == mine[:2]]
    those = [each for rank in group if (each := facts[rank]) is not None]
    names = [n for n in layouts if mine and all(each.layouts.get(n) == mine.layouts[n] for each in those)]
    sharing = None
    if store is not None and len(group) > 1 and names:
        kept = set(names).intersection(*(each.common for each in those))
        sharing = _Sharing(store, {name: layouts[name] for name in names}, kept, group.index(exchange.rank), len(group))
    offers = exchange.everywhere(None if sharing is None or sharing.rank else sharing.offer())
    problems = exchange.everywhere(None if sharing is None else sharing.take(offers[group[0]]))
    if sharing is None:
        return store
    problem = next((problems[rank] for rank in group if problems[rank]), None)
    if problem is None:
        return sharing.done(offers[group[0]])
    logger.warning(
        "each process of this host keeps its own copy of the streamed layers, at the cost of memory: %s", problem
    )
    return sharing.undone()


def _facts(store: Store, layouts: Layouts) -> Facts:
    kind = type(store.common if isinstance(store, SharedStore) else store)
    said = {name: [(key, *spec) for key, spec in specs.items()] for name, specs in layouts.items()}
    return Facts(host(), kind, said, frozenset(store.index if isinstance(store, SharedStore) else ()))


class _Sharing:
    """The steps by which processes of a host come to share blocks; errors in one of them are returned, for all to know.

    Args:
        store: the store so far, with the values.
        layouts: of the blocks to be shared.
        kept: those of them that already are.
        rank: index of this process among those of the host; 0 offers its blocks to the others.
        ranks: number of processes of the host.
    """

    def __init__(self, store: Store, layouts: Layouts, kept: set[str], rank: int, ranks: int):
        self.store, self.layouts, self.rank, self.ranks = store, layouts, rank, ranks
        self.fresh = [name for name in layouts if name not in kept]
        self.own: RamStore | DiskStore = store.own if isinstance(store, SharedStore) else store
        self.common: RamStore | DiskStore | None = store.common if isinstance(store, SharedStore) else None
        self.board: Board | None = None
        self.files: list[int] = []

    def offer(self) -> Offer | str:
        """Puts the blocks where the others find them."""
        try:
            board, _ = self._new("zo-board", Board.size(self.ranks, len(self.layouts)))
            if isinstance(self.own, DiskStore):
                if self.common is None:
                    self.common = self.own
                    self.own = DiskStore(None if self.own.removal else self.own.folder / "own")
                assert isinstance(self.common, DiskStore)
                blocks: dict[str, Any] = {name: self._in_files(self.common, name) for name in self.fresh}
                folder, temporary = self.common.folder.absolute(), self.common.removal is not None
                return Offer(os.getpid(), board, folder, temporary, blocks)
            self.common = self.common or RamStore(self.own.pinned)
            assert isinstance(self.common, RamStore)
            blocks = {name: self._in_memory(self.common, name) for name in self.fresh}
            return Offer(os.getpid(), board, None, False, blocks)
        except (OSError, StateError, ConfigError) as error:
            return str(error)

    def _new(self, name: str, size: int) -> tuple[int, mmap.mmap]:
        file, memory = new_memory(name, size)
        self.files.append(file)
        return file, memory

    def _in_files(self, common: DiskStore, name: str) -> dict[str, Piece]:
        if self.store is not common and self.own.holds(name):
            common.put(name, self.own.mapped(name))
            self.own.drop(name)
        found = common.pieces[name].items()
        return {
            key: piece if piece.path is None else replace(piece, path=piece.path.absolute()) for key, piece in found
        }

    def _in_memory(self, common: RamStore, name: str) -> int:
        file, memory = self._new("zo-block", slab_bytes(self.layouts[name]))
        values = self.store.mapped(name)
        common.place(name, memory, self.layouts[name])
        for key, tensor in common.mapped(name).items():
            tensor.copy_(values[key])
        self.own.drop(name)
        return file

    def take(self, offer: Offer | str) -> str | None:
        """Finds the blocks of the offer; returns what went wrong."""
        if isinstance(offer, str):
            return offer
        try:
            file = open_memory(offer.process, offer.board)
            self.board = Board(file, self.rank, self.ranks, len(self.layouts))
            if self.rank and offer.folder is not None:
                self.common = self.common or DiskStore(offer.folder)
                assert isinstance(self.common, DiskStore)
                for name, pieces in offer.blocks.items():
                    self.common.adopt(name, pieces)
            elif self.rank:
                assert isinstance(self.own, RamStore)
                self.common = self.common or RamStore(self.own.pinned)
                assert isinstance(self.common, RamStore)
                for name, there in offer.blocks.items():
                    self.common.place(name, mapped_memory(offer.process, there), self.layouts[name])
        except (OSError, StateError, ConfigError) as error:
            return str(error)
        return None

    def done(self, offer: Offer) -> SharedStore:
        """The store with the common blocks, when all processes have them."""
        self._close()
        assert self.common is not None
        assert self.board is not None
        for name in self.fresh:
            self.own.drop(name)
        if isinstance(self.own, DiskStore):
            self.own.tidy()
        if isinstance(self.common, DiskStore) and self.common.removal is not None:
            self.common.removal.detach()
        logger.info("%d processes of this host share %d streamed layers", self.ranks, len(self.layouts))
        folder = offer.folder if offer.temporary else None
        if isinstance(self.store, SharedStore):
            folder = self.store.retire() or folder
        index = {name: place for place, name in enumerate(self.layouts)}
        return SharedStore(self.own, self.common, self.board, index, folder)

    def undone(self) -> RamStore | DiskStore:
        """A store with all blocks for this process alone."""
        self._close()
        for name in self.layouts:
            if not self.own.holds(name):
                assert self.common is not None
                self.own.put(name, {key: tensor.clone() for key, tensor in self.common.mapped(name).items()})
        if self.board is not None:
            self.board.leave()
        if isinstance(self.store, SharedStore):
            self.store.leave()
        return self.own

    def _close(self) -> None:
        for file in self.files:
            os.close(file)
        self.files = []
