"""Which tensors view the same memory, and how: tensors are tied by their bytes, not by equal shapes.

An `Extent` describes the bytes that a tensor views. Tensors with equal extents view the same elements in some order.
Whether different extents have elements in common is looked up in a map of the memory, and only if their bounds
overlap, so the cost is that of sorting the tensors of a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Key = TypeVar("Key")
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

#: Size and stride of a view, and its offset from the lead, in elements.
Way = tuple[torch.Size, tuple[int, ...], int]


@dataclass(frozen=True)
class Extent:
    """The bytes that a tensor views, regardless of order.

    Attributes:
        device: where they are.
        begin: address of the first byte.
        dtype: dtype of the elements.
        dims: stride in bytes and size, outermost first; adjacent runs are merged, and the last is a run of bytes.
    """

    device: torch.device
    begin: int
    dtype: torch.dtype
    dims: tuple[tuple[int, int], ...]

    @property
    def end(self) -> int:
        """The address after the last byte."""
        return self.begin + 1 + sum(stride * (size - 1) for stride, size in self.dims)

    @property
    def nested(self) -> bool:
        """Whether each stride exceeds the reach of the inner dimensions; then no byte is viewed twice."""
        reach = 1
        for stride, size in reversed(self.dims):
            if stride < reach:
                return False
            reach += stride * (size - 1)
        return True


def as_it_lies(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Lets a function inspect the current memory of parameters, without loading the values of stand-ins."""

    @wraps(function)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with torch.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    return run


@as_it_lies
def extent(tensor: Tensor) -> Extent | None:
    """Where the elements of a tensor are; None if it has no memory of its own (empty, meta, sparse)."""
    own = tensor.layout is torch.strided and not tensor.is_meta and not is_traceable_wrapper_subclass(tensor)
    if not own or not tensor.numel():
        return None
    itemsize = tensor.element_size()
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    dims = sorted(((stride * itemsize, size) for stride, size in pairs if size > 1), reverse=True)
    merged: list[tuple[int, int]] = []
    for stride, size in [*dims, (1, itemsize)]:
        if merged and merged[-1][0] == stride * size:
            size *= merged.pop()[1]
        merged.append((stride, size))
    return Extent(tensor.device, tensor.data_ptr(), tensor.dtype, tuple(merged))


def shows_twice(tensor: Tensor) -> bool:
    """Whether several elements of a tensor share memory, like those of an expanded view."""
    where = extent(tensor)
    if where is None or where.nested:
        return False
    if any(stride == 0 for stride, _ in where.dims):
        return True
    chart = Chart([where])
    chart.mark(where, 0)
    return int((chart.owners >= 0).sum()) < chart.view(where).numel()


def neighbours(extents: Iterable[tuple[Key, Extent]]) -> Iterator[list[tuple[Key, Extent]]]:
    """Groups of two or more extents whose bounds overlap."""
    together: list[tuple[Key, Extent]] = []
    end = 0
    for key, where in sorted(extents, key=lambda pair: (str(pair[1].device), pair[1].begin)):
        if together and (where.device != together[0][1].device or where.begin >= end):
            if len(together) > 1:
                yield together
            together, end = [], 0
        together.append((key, where))
        end = max(end, where.end)
    if len(together) > 1:
        yield together


@as_it_lies
def in_several_ways(model: nn.Module) -> set[int]:
    """``id`` of the parameters and buffers whose bounds overlap those of another one with a different view."""
    held = [*model.parameters(), *model.buffers()]
    placed = [(tensor, where) for tensor in held if (where := extent(tensor)) is not None]
    return {
        id(tensor)
        for cluster in neighbours(placed)
        if len({(tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) for tensor, _ in cluster}) > 1
        for tensor, _ in cluster
    }


class Chart:
    """A map of the memory around some extents, in units that divide every run and every distance in it."""

    def __init__(self, extents: Sequence[Extent]):
        self.begin = min(where.begin for where in extents)
        self.unit = 0
        for where in extents:
            *outer, (_, run) = where.dims
            self.unit = math.gcd(self.unit, where.begin - self.begin, run, *(stride for stride, _ in outer))
        size = -(-(max(where.end for where in extents) - self.begin) // self.unit)
        self.owners = torch.full((size,), -1, dtype=torch.int32)

    def view(self, where: Extent) -> Tensor:
        """The view of the map that an extent has."""
        *outer, (_, run) = where.dims
        sizes = [*(size for _, size in outer), run // self.unit]
        strides = [*(stride // self.unit for stride, _ in outer), 1]
        return self.owners.as_strided(sizes, strides, (where.begin - self.begin) // self.unit)

    def mark(self, where: Extent, owner: int) -> None:
        """Marks an extent as owned by ``owner``."""
        self.view(where).copy_(torch.tensor(owner, dtype=torch.int32))

    def met(self, where: Extent) -> list[int]:
        """The owners of the memory that an extent views."""
        return torch.bincount(self.view(where).reshape(-1) + 1)[1:].nonzero().view(-1).tolist()


@dataclass(frozen=True)
class Region:
    """Memory that the tensors of a slot view in different ways.

    The other tensors can be obtained as views of values of the lead that come from `room` or are in memory.

    Attributes:
        ways: how each tensor of the slot views it, the lead first.
        leads: how many of them are trainable and have the same view as the lead.
        start: where it begins, in elements after the lead's first; 0 or less.
        numel: number of elements.
    """

    ways: tuple[Way, ...]
    leads: int
    start: int
    numel: int

    @classmethod
    def of(cls, tensors: Sequence[Tensor], leads: int) -> Region | None:
        """The region of tensors with overlapping memory; None if all of them have the same view.

        Args:
            tensors: the lead first.
            leads: how many of the first tensors may lead.
        """
        lead, itemsize = tensors[0], tensors[0].element_size()
        alike = [t.shape == lead.shape and t.stride() == lead.stride() for t in tensors]
        if all(alike) and leads == len(tensors):
            return None
        offsets = [(tensor.data_ptr() - lead.data_ptr()) // itemsize for tensor in tensors]
        ways = tuple((t.shape, t.stride(), offset) for t, offset in zip(tensors, offsets, strict=True))
        return cls(ways, leads, min(offsets), max(map(_reach, ways)) - min(offsets))

    def seen(self, index: int, values: Tensor) -> Tensor:
        """The view of the tensor at ``index`` if the lead has these values, which may be stacked copies."""
        size, stride, offset = self.ways[index]
        extra = values.ndim - len(self.ways[0][0])
        stride = (*values.stride()[:extra], *stride)
        return values.as_strided((*values.shape[:extra], *size), stride, values.storage_offset() + offset)

    def room(self, values: Tensor, take: Callable[[Tensor], Tensor]) -> Tensor:
        """Memory for other values of the lead; what only the other tensors view is copied into it.

        Args:
            values: values of the lead, in memory.
            take: allocates a tensor like another one.
        """
        flat = self._flat(values)
        memory = take(flat)
        if self.numel > values.numel():
            memory.copy_(flat)
        return memory.as_strided(values.shape, values.stride(), memory.storage_offset() - self.start)

    def spread(self, values: Tensor, stack: Tensor) -> Tensor:
        """Copies ``stack``, several values of the lead, into memory like that of `room`."""
        flat = self._flat(values)
        memory = flat.expand(len(stack), -1).clone(memory_format=torch.contiguous_format)
        size, stride = (len(stack), *values.shape), (self.numel, *values.stride())
        return memory.as_strided(size, stride, -self.start).copy_(stack)

    def _flat(self, values: Tensor) -> Tensor:
        return values.as_strided((self.numel,), (1,), values.storage_offset() + self.start)


def _reach(way: Way) -> int:
    """The index after the last element, counted from the lead's first."""
    size, stride, offset = way
    return offset + 1 + sum(step * (count - 1) for count, step in zip(size, stride, strict=True))
