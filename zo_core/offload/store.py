"""Where evicted blocks live. A store moves bytes and knows no maths."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ConfigError, StateError

Tensors = dict[str, Tensor]


class RamStore:
    """Blocks in host memory: each tensor exactly once, in the memory it came in."""

    def __init__(self) -> None:
        self.blocks: dict[str, Tensors] = {}

    def put(self, block: str, tensors: Tensors) -> None:
        """Takes over the tensors of a block."""
        self.blocks[block] = {name: tensor.to("cpu") for name, tensor in tensors.items()}

    def read(self, block: str, into: Tensors) -> None:
        """Copies a block's values into tensors of the same names and shapes."""
        for name, tensor in self.blocks[block].items():
            into[name].copy_(tensor, non_blocking=True)

    def write(self, block: str, tensors: Tensors, changed: Collection[str]) -> None:
        """Takes the new values of the tensors named in ``changed``; ``tensors`` are all of the block."""
        for name in changed:
            self.blocks[block][name].copy_(tensors[name])

    def whole(self, block: str) -> Tensors:
        """The stored tensors themselves."""
        return self.blocks[block]


class DiskStore:
    """Blocks as safetensors files, one each, read with positioned reads and never mapped.

    A live mapping would count as resident memory, and the page cache is advised to let go of what
    was read. A file is written under another name, synced and renamed, so that it is always whole.

    Args:
        folder: made if it is missing; block files of an earlier run in it are overwritten. None makes
            a temporary one that goes away with this object.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None):
        if folder is None:
            folder = tempfile.mkdtemp(prefix="zo-offload-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ConfigError([f"offload_dir={str(folder)!r} cannot be written to: {error.strerror}"]) from error
        self.specs: dict[str, dict[str, tuple[torch.Size, torch.dtype]]] = {}

    def _path(self, block: str) -> Path:
        return self.folder / f"{block}.safetensors"

    def put(self, block: str, tensors: Tensors) -> None:
        """Writes a block for the first time."""
        self.specs[block] = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        temporary = self.folder / f"{block}.tmp"
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, self._path(block))
        except Exception as error:  # safetensors has an error type of its own for a full disk
            temporary.unlink(missing_ok=True)
            raise StateError(
                f"block {block!r} could not be written to {self.folder}: {error}; the file from before is still "
                "whole. Free some space, or choose another offload_dir"
            ) from error

    def read(self, block: str, into: Tensors) -> None:
        """Reads a block's values into tensors of the same names and shapes."""
        try:
            with open(self._path(block), "rb", buffering=0) as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
                for name, tensor in into.items():
                    begin, end = header[name]["data_offsets"]
                    self._fill(file.fileno(), tensor, 8 + length + begin, end - begin)
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        except (OSError, ValueError, KeyError) as error:
            raise StateError(
                f"block {block!r} cannot be read from {self._path(block)}: {error}; the file is missing or damaged"
            ) from error

    @staticmethod
    def _fill(descriptor: int, tensor: Tensor, offset: int, size: int) -> None:
        host = tensor if tensor.device.type == "cpu" else torch.empty_like(tensor, device="cpu")
        target = host.view(-1).view(torch.uint8).numpy().data
        if len(target) != size:
            raise ValueError(f"{len(target)} bytes expected, {size} found")
        done = 0
        while done < size:
            count = os.preadv(descriptor, [target[done:]], offset + done)
            if count == 0:
                raise ValueError("the file ends too early")
            done += count
        if host is not tensor:
            tensor.copy_(host)

    def write(self, block: str, tensors: Tensors, changed: Collection[str]) -> None:
        """Writes the block anew."""
        self.put(block, tensors)

    def whole(self, block: str) -> Tensors:
        """The block's tensors, read into fresh memory."""
        tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in self.specs[block].items()}
        self.read(block, tensors)
        return tensors
