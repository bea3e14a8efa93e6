"""Parts of larger tensors: which elements of the whole one a process holds, so that it computes only their noise.

Noise and the bits of stochastic rounding are functions of an element's index in the whole tensor, row by row. The
elements of a part lie there in runs at equal distances: a part of the rows is one run, and a part of the columns has
a run in each row. What is computed for a `Band` of elements, runs and what is between them, is then picked from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
from torch import Tensor

#: Elements of the largest whole tensor, up to which an index of a word has 32 bits in any noise.
MOST_ELEMENTS = 1 << 32


@dataclass(frozen=True)
class Band:
    """Consecutive elements of a whole tensor, and which of them belong to a part.

    Attributes:
        first: index of the first one.
        runs: number of runs.
        run: elements of each.
        stride: distance between the beginnings of two runs.
    """

    first: int
    runs: int
    run: int
    stride: int

    @property
    def length(self) -> int:
        return (self.runs - 1) * self.stride + self.run

    def pick(self, values: Tensor) -> Tensor:
        """Those of the values, one for each element of the band, that belong to the part."""
        if self.runs == 1:
            return values
        return values.as_strided((self.runs, self.run), (self.stride, 1), values.storage_offset()).reshape(-1)

    def picked(self, compute: Callable[[int, int], Tensor]) -> Tensor:
        """As `pick`, of what ``compute`` returns for an index and a number of elements."""
        return self.pick(compute(self.first, self.length))


@dataclass(frozen=True)
class Part:
    """A part of a tensor: an interval of the indices in each dimension.

    Attributes:
        whole: shape of the whole tensor.
        begin: first index in each dimension.
        size: number of indices in each dimension; the shape of the part.
    """

    whole: torch.Size
    begin: tuple[int, ...]
    size: tuple[int, ...]

    @cached_property
    def _dims(self) -> list[tuple[int, int]]:
        """Size and stride of the part within the whole, outermost first; dimensions that are one run are merged."""
        stride, dims = 1, [(1, 1)]
        for whole, size in zip(reversed(self.whole), reversed(self.size), strict=True):
            inner, step = dims[0]
            if stride == inner * step:
                dims[0] = (size * inner, step)
            else:
                dims.insert(0, (size, stride))
            stride *= whole
        return dims

    @cached_property
    def _starts(self) -> list[int]:
        """Index of the first element of each group of runs at equal distances."""
        stride, first = 1, 0
        for whole, begin in zip(reversed(self.whole), reversed(self.begin), strict=True):
            first, stride = first + begin * stride, stride * whole
        outer = [range(0, size * stride, stride) for size, stride in self._dims[:-2]]
        return [first + sum(steps) for steps in product(*outer)]

    @property
    def _runs(self) -> tuple[int, int, int]:
        """Number of runs in a group, elements of a run, and the distance of runs."""
        (runs, stride), (run, _) = [(1, 0), *self._dims][-2:]
        return runs, run, stride or run

    def pieces(self, most: int) -> Iterator[tuple[int, int]]:
        """Where pieces of the part begin and end, counted within it; a band of each has about ``most`` elements."""
        if not math.prod(self.size):
            return
        runs, run, stride = self._runs
        at_once = max(1, most // stride)
        for start in range(0, len(self._starts) * runs * run, runs * run):
            if at_once == 1:
                for at in range(start, start + runs * run, run):
                    yield from ((one, min(one + most, at + run)) for one in range(at, at + run, most))
            else:
                end = start + runs * run
                yield from ((at, min(at + at_once * run, end)) for at in range(start, end, at_once * run))

    def band(self, start: int, stop: int) -> Band:
        """Where a piece lies in the whole tensor."""
        runs, run, stride = self._runs
        row, within = divmod(start, run)
        group, index = divmod(row, runs)
        size = stop - start
        count = max(1, size // run)
        assert size <= run - within or (within == 0 and size == count * run)
        return Band(self._starts[group] + index * stride + within, count, min(size, run), stride)
