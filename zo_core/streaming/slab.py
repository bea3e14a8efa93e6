"""The tensors of a block in one piece of memory, so that a single copy moves all of them.

They have the same order and the same places wherever the block is: in an arena slot, in host memory, or in memory that
several processes share. State that a rule adds later follows behind the parameters, in a slab of its own on the host.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from mmap import mmap

import torch
from torch import Tensor

from .tensor_file import Tensors

#: Shape and dtype of each tensor, by name; their order is that in memory.
Specs = Mapping[str, tuple[torch.Size, torch.dtype]]

#: Every tensor begins at a multiple of this many bytes. Libraries of matrix products choose their kernel by the
#: alignment of a pointer, up to this one, and a streamed weight has to be computed with like a resident one.
ALIGNMENT = 256


def slab_bytes(specs: Specs) -> int:
    """Bytes of a slab."""
    return sum(_room(*spec) for spec in specs.values())


def specs_of(tensors: Tensors) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """The shapes and dtypes of tensors."""
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


class Slab(dict[str, Tensor]):
    """Tensors by name, one behind the other.

    Args:
        memory: at least `slab_bytes`; an arena slot, or a mapping, which is one whole for copies, and in which each
            tensor has a storage of its own: who saves tensors, takes those that share one for tied weights.
        specs: the tensors.

    Attributes:
        memory: all bytes.
        begins: where each tensor begins.
    """

    def __init__(self, memory: Tensor | mmap, specs: Specs):
        super().__init__()
        self.begins: dict[str, int] = {}
        self._ends: dict[str, int] = {}
        with torch.inference_mode(False):  # or views of another dtype are inference tensors, which cannot be filled
            self.memory = memory if isinstance(memory, Tensor) else torch.frombuffer(memory, dtype=torch.uint8)
            end = 0
            for name, (shape, dtype) in specs.items():
                begin, end = end, end + _room(shape, dtype)
                self.begins[name], self._ends[name] = begin, end
                self[name] = _piece(memory, begin, shape.numel() * dtype.itemsize).view(dtype).view(shape)

    def runs(self, names: Collection[str], other: Slab) -> list[tuple[int, int, int]]:
        """The fewest pieces that hold some tensors both here and in another slab.

        Args:
            names: tensors of both.
            other: a slab with the same specs for these names.

        Returns:
            Where each piece begins and ends here, and where it begins there.
        """
        found: list[tuple[int, int, int]] = []
        for name, begin in self.begins.items():
            if name not in names:
                continue
            there = other.begins[name]
            if found and found[-1][1] == begin and found[-1][2] - found[-1][0] == there - begin:
                begin, _, there = found.pop()
            found.append((begin, self._ends[name], there))
        return found


def copy(into: Tensors, source: Tensors, names: Collection[str]) -> None:
    """Copies the tensors of these names: those that are neighbours in two slabs at once.

    Copies between registered memory and CUDA are only enqueued.
    """
    if isinstance(into, Slab) and isinstance(source, Slab):
        for begin, end, there in source.runs(names, into):
            into.memory[there : there + end - begin].copy_(source.memory[begin:end], non_blocking=True)
    else:
        for name in names:
            into[name].copy_(source[name], non_blocking=True)


def _room(shape: torch.Size, dtype: torch.dtype) -> int:
    return -(-shape.numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def _piece(memory: Tensor | mmap, begin: int, size: int) -> Tensor:
    if isinstance(memory, Tensor):
        return memory[begin : begin + size]
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(memory, dtype=torch.uint8, offset=begin, count=size)
