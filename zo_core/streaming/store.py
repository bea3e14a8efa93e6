"""Where evicted blocks live. A store only moves bytes."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from ..errors import ConfigError, StateError
from ..files import removed_with, replacing
from ..ranks import world_size
from ..sizes import human
from .slab import Slab, Specs, copy, slab_bytes, specs_of
from .tensor_file import Piece, Tensors, bytes_of, read_header, write_file

logger = logging.getLogger(__name__)

#: Updates of a block that were not applied yet, oldest first, each with the names that it changes.
Pending = list[tuple[tuple[str, ...], Callable[[Tensors], None]]]

#: The flag of the driver for memory that is registered for all devices, not only for the current one.
PORTABLE = 1


#: What tells a file from what it was: device, inode, size and time of the last change.
Stamp = tuple[int, int, int, int]

#: Bytes that a CPU copies in the time that another thread needs to begin.
SOON_BYTES = 256 << 10


class OwnBlocks:
    """What a store whose blocks no other process uses has to do about others: nothing. See `SharedStore`.

    Class attributes:
        in_place: whether `whole` returns the stored tensors themselves.
    """

    in_place: ClassVar[bool]

    def shares(self, block: str) -> bool:
        """Whether other processes use the block, too."""
        return False

    def queued(self, block: str, pending: Pending) -> None:
        """Called when an update of a block was added to those that are pending."""

    def due(self, block: str, pending: Pending) -> Pending:
        """The updates to apply to the values of a block that were read last; drops those that nobody needs any more."""
        taken = list(pending)
        pending.clear()
        return taken

    def note_applied(self, block: str, pending: Pending) -> None:
        """Called when what was `due` has been applied to the values that were read last."""

    def complete(self, block: str, pending: Pending) -> bool:
        """Whether all updates are in the stored values; if not, waits until they can be written, and they have to be.

        Raises:
            RanksError: another process does not come to the same step.
        """
        return True

    def part(self, block: str, tensors: Tensors) -> None:
        """Makes a copy of a shared block for this process alone.

        Args:
            block: the block.
            tensors: all of its tensors, with all updates.
        """

    def leave(self) -> None:
        """Ends the use of the blocks."""

    def same_as(self, block: str, key: str, name: str) -> bool:
        """Makes tensor ``key`` what ``name`` is now, if that is in a file that is never written; returns whether."""
        return False


class RamStore(OwnBlocks):
    """Blocks in host memory, each tensor exactly once.

    Args:
        pinned: for copies to and from CUDA; each block then gets memory of its own that is registered
            with the driver, of exactly the pages that it needs. (PyTorch's allocator of pinned memory
            rounds up to powers of two.) Otherwise, and from the first refusal of the driver on, tensors stay in the
            memory that they are passed in.

    Attributes:
        blocks: all tensors of each block, by name.
        slabs: those of them that are one behind the other, in memory that is registered or shared.
    """

    in_place = True

    def __init__(self, pinned: bool = False) -> None:
        self.pinned = self.registers = pinned
        self.blocks: dict[str, Tensors] = {}
        self.slabs: dict[str, list[Slab]] = {}
        #: Tensors of zeros without memory so far; they get it together.
        self._zeros: dict[str, dict[str, tuple[torch.Size, torch.dtype]]] = {}
        #: What ends the registration of memory, by its address.
        self._known: dict[int, weakref.finalize[..., RamStore]] = {}

    def put(self, block: str, tensors: Tensors) -> None:
        """Takes over the tensors of a block, or copies them into pinned memory that it has for them already."""
        kept = self.whole(block) if block in self.blocks else self.blocks.setdefault(block, {})
        if not self.pinned:
            kept.update({name: tensor.to("cpu") for name, tensor in tensors.items()})
            return
        fresh = {name: tensor for name, tensor in tensors.items() if name not in kept}
        slab = self._slab(block, specs_of(fresh))
        kept.update({name: tensor.to("cpu") for name, tensor in fresh.items()} if slab is None else slab)
        for name, tensor in tensors.items():
            if slab is not None or name not in fresh:
                kept[name].copy_(tensor)

    def add_zeros(self, block: str, name: str, shape: torch.Size, dtype: torch.dtype) -> None:
        """Adds a tensor of zeros to a block."""
        self._zeros.setdefault(block, {})[name] = shape, dtype

    def _slab(self, block: str, specs: Specs) -> Slab | None:
        """Registered memory for tensors of a block, all zeros; None if they are to have ordinary memory."""
        size = slab_bytes(specs)
        memory = self._registered(size) if self.registers and size else None
        if memory is None:
            return None
        slab = Slab(memory, specs)
        self.slabs.setdefault(block, []).append(slab)
        return slab

    def _registered(self, size: int) -> mmap.mmap | None:
        """New memory that the driver knows; None if it refuses."""
        # Whole pages, because two pieces of memory that share a page could not both be registered.
        memory = mmap.mmap(-1, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
        return memory if self._register(memory) else None

    def _register(self, memory: mmap.mmap) -> bool:
        """Makes the driver know memory until the block is dropped; returns whether it has not refused."""
        address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        driver = torch.cuda.cudart()
        try:
            torch.cuda.check_error(driver.cudaHostRegister(address, len(memory), PORTABLE))
        except RuntimeError as error:
            self.registers = False
            _clear_error()
            done = sum(len(slab.memory) for held in self.slabs.values() for slab in held)
            logger.warning(
                "the driver registers no more host memory after %s (%s); the other layers are copied from ordinary "
                "memory, which is slower and waits for the device. WSL and containers often have a limit",
                human(done),
                str(error),  # the error itself would hold this store
            )
            return False
        self._known[address] = weakref.finalize(self, driver.cudaHostUnregister, address)
        return True

    def read(self, block: str, into: Tensors) -> None:
        """Copies a block's values into tensors of the same names and shapes."""
        for part in self._parts(block):
            copy(into, part, part.keys())

    def write(self, block: str, tensors: Tensors, changed: Collection[str]) -> None:
        """Takes the new values of the tensors named in ``changed``; ``tensors`` are all of the block."""
        for part in self._parts(block):
            copy(part, tensors, part.keys() & changed)

    def _parts(self, block: str) -> list[Tensors]:
        """The slabs of a block, and what is in none."""
        loose, parts = dict(self.whole(block)), list[Tensors](self.slabs.get(block, ()))
        for name in chain(*parts):
            del loose[name]
        return [*parts, loose]

    def returns_soon(self, nbytes: int) -> bool:
        """Whether `read` and `write` of so many bytes return sooner than another thread would have begun."""
        return self.registers if self.pinned else nbytes <= SOON_BYTES  # copies of registered memory are only enqueued

    def whole(self, block: str) -> Tensors:
        """The stored tensors themselves."""
        specs = self._zeros.pop(block, None)
        if specs is not None:
            added: Tensors | None = self._slab(block, specs)
            if added is None:
                with torch.inference_mode(False):
                    added = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in specs.items()}
            self.blocks[block].update(added)
        return self.blocks[block]

    def mapped(self, block: str) -> Tensors:
        """The stored tensors themselves, as from `whole`."""
        return self.whole(block)

    def place(self, block: str, memory: mmap.mmap, specs: Specs) -> None:
        """Keeps a block in this memory from now on, which has its values, or gets them."""
        self.drop(block)
        if self.registers:
            self._register(memory)
        slab = Slab(memory, specs)
        self.blocks[block], self.slabs[block] = dict(slab), [slab]

    def holds(self, block: str) -> bool:
        """Whether the block is here."""
        return block in self.blocks

    def drop(self, block: str) -> None:
        """Gives up a block."""
        self.blocks.pop(block, None)
        self._zeros.pop(block, None)
        for slab in self.slabs.pop(block, ()):
            if slab.memory.data_ptr() in self._known:
                self._known.pop(slab.memory.data_ptr())()


def _clear_error() -> None:
    """Clears the error that a refused call leaves behind in the runtime: the next kernel would raise it once."""
    with contextlib.suppress(RuntimeError):
        torch.ones((), device="cuda")


def own_folder(folder: str | os.PathLike[str] | None) -> str | os.PathLike[str] | None:
    """The folder for the block files of this process, given the ``offload_dir`` of all: its own but for rank 0."""
    rank = dist.get_rank() if world_size() > 1 else int(os.environ.get("RANK", 0))  # perhaps there is no group yet
    return folder if folder is None or not rank else Path(folder) / f"rank{rank}"


class DiskStore(OwnBlocks):
    """Blocks in safetensors files, read with positioned reads and not mapped while they are trained.

    A live mapping would count as resident memory, and the page cache is advised to drop what was
    read. A file is written under another name, synced and renamed, so that it is always complete.

    Args:
        folder: created if it does not exist; block files of an earlier run in it are overwritten. None
            creates a temporary one that is removed with this object.

    Attributes:
        removal: what removes a temporary folder; None for another one.

    Raises:
        ConfigError: the folder cannot be written to.
    """

    in_place = False

    def __init__(self, folder: str | os.PathLike[str] | None = None):
        self.removal: weakref.finalize[..., DiskStore] | None = None
        if folder is None:
            folder = tempfile.mkdtemp(prefix="zo-offload-")
            self.removal = removed_with(self, folder)
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / ".writable"
            probe.touch()
            probe.unlink(missing_ok=True)  # another process may try the same
        except OSError as error:
            raise ConfigError([f"offload_dir={str(folder)!r} cannot be written to: {error.strerror}"]) from error
        self.pieces: dict[str, dict[str, Piece]] = {}
        #: The files of adopted blocks, as they were.
        self._adopted: dict[Path, Stamp] = {}

    def put(self, block: str, tensors: Tensors, kept: Mapping[str, Piece] | None = None) -> None:
        """Writes a block as a file of its own, but for tensors that are ``kept`` where they are.

        Raises:
            StateError: the file could not be written; an earlier one is unchanged.
        """
        path = self._file(block)
        try:
            self.folder.mkdir(exist_ok=True)
            with replacing(path) as fresh:
                write_file(tensors, fresh)
                pieces = read_header(fresh)
        except OSError as error:
            raise StateError(
                f"block {block!r} could not be written to {self.folder}: {error}; the file from before is still "
                "whole. Free some space, or choose another offload_dir"
            ) from error
        self.pieces[block] = {name: replace(piece, path=path) for name, piece in pieces.items()} | dict(kept or {})

    def adopt(self, block: str, pieces: dict[str, Piece]) -> None:
        """Uses a block that is stored in other files, which are never written."""
        self.pieces[block] = pieces
        for piece in pieces.values():
            if piece.path is not None and not self._is_own(block, piece):
                self._adopted.setdefault(piece.path, _stamp(os.stat(piece.path)))

    def _check(self, path: Path, now: os.stat_result) -> None:
        """Raises `StateError` if an adopted file is not what it was."""
        if self._adopted.get(path, _stamp(now)) != _stamp(now):
            raise StateError(
                f"{path} has changed since the model was opened from it, and the run still reads weights from it; save "
                "to another folder than the one that was opened, and begin again from the last checkpoint"
            )

    def same_as(self, block: str, key: str, name: str) -> bool:
        piece = self.pieces[block][name]
        if self._is_own(block, piece):
            return False
        self.pieces[block][key] = piece
        return True

    def _is_own(self, block: str, piece: Piece) -> bool:
        """Whether a tensor is in the block's own file, or is to be from the next write on."""
        return piece.path is None or piece.path == self._file(block)

    def look(self, block: str) -> None:
        """Finds the file of a block that another process has written."""
        self.pieces[block] |= read_header(self._file(block))  # what is not in it is where it was

    def holds(self, block: str) -> bool:
        """Whether the block is here."""
        return block in self.pieces

    def drop(self, block: str) -> None:
        """Gives up a block, and removes its file if it has one in the folder."""
        if self.pieces.pop(block, None) is not None:
            self._file(block).unlink(missing_ok=True)

    def tidy(self) -> None:
        """Removes the folder if nothing is in it; it is made again when a block is written."""
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _file(self, block: str) -> Path:
        return self.folder / f"{block}.safetensors"

    def add_zeros(self, block: str, name: str, shape: torch.Size, dtype: torch.dtype) -> None:
        """Adds a tensor of zeros to a block; it takes no space until the block is written."""
        self.pieces[block][name] = Piece(shape, dtype)

    def returns_soon(self, nbytes: int) -> bool:
        """Never: files take their time."""
        return False

    def read(self, block: str, into: Tensors) -> None:
        """Reads a block's values into tensors of the same names and shapes.

        Raises:
            StateError: a file is missing or damaged, or one that is not this store's has changed.
        """
        paths: dict[Path, list[str]] = {}
        for name, tensor in into.items():
            path = self.pieces[block][name].path
            if path is None:
                tensor.zero_()
            else:
                paths.setdefault(path, []).append(name)
        for path, names in paths.items():
            try:
                with open(path, "rb", buffering=0) as file:
                    self._check(path, os.fstat(file.fileno()))
                    for name in names:
                        _fill(file.fileno(), into[name], self.pieces[block][name].begin)
            except (OSError, ValueError) as error:
                raise StateError(
                    f"block {block!r} cannot be read from {path}: {error}; the file is missing or damaged"
                ) from error

    def write(self, block: str, tensors: Tensors, changed: Collection[str]) -> None:
        """Writes the block again, but for what is unchanged in a file that is never written."""
        pieces = self.pieces[block].items()
        kept = {name: piece for name, piece in pieces if name not in changed and not self._is_own(block, piece)}
        self.put(block, {name: tensor for name, tensor in tensors.items() if name not in kept}, kept)

    def whole(self, block: str) -> Tensors:
        """The block's tensors, read into new memory."""
        tensors = {name: torch.empty(piece.shape, dtype=piece.dtype) for name, piece in self.pieces[block].items()}
        self.read(block, tensors)
        return tensors

    def mapped(self, block: str) -> Tensors:
        """The block's tensors as mappings of its files, whose memory the kernel can take back at any time."""
        tensors: Tensors = {}
        for name, piece in self.pieces[block].items():
            if piece.path is None:
                tensors[name] = torch.zeros((), dtype=piece.dtype).expand(piece.shape)
            else:
                self._check(piece.path, os.stat(piece.path))
                with safe_open(piece.path, "pt") as file:
                    tensors[name] = file.get_tensor(piece.key)
        return tensors


def _stamp(found: os.stat_result) -> Stamp:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _fill(descriptor: int, tensor: Tensor, offset: int) -> None:
    """Reads the bytes of a tensor from a file."""
    host = tensor if tensor.device.type == "cpu" else torch.empty_like(tensor, device="cpu")
    target = bytes_of(host)
    done, size = 0, len(target)
    while done < size:
        count = os.preadv(descriptor, [target[done:]], offset + done)
        if count == 0:
            raise ValueError("the file ends too early")
        done += count
    if size and hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_DONTNEED)
    if host is not tensor:
        tensor.copy_(host)
