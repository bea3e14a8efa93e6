"""Laws of parts of tensors: a process that holds one computes the bits that the whole tensor has there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from zo_core.noise import NOISES, Passes
from zo_core.noise.changes import Change
from zo_core.noise.parts import Part

#: Shape of the whole tensor, and begin and size of a part. The last two are longer than a chunk.
PARTS = [
    ((7, 5), (2, 0), (3, 5)),
    ((7, 5), (0, 1), (7, 3)),
    ((7, 5), (3, 2), (2, 2)),
    ((7,), (2,), (4,)),
    ((3, 4, 5), (0, 1, 0), (3, 2, 5)),
    ((3, 4, 5), (1, 0, 2), (2, 4, 3)),
    ((3, 4, 5, 2), (1, 2, 1, 1), (2, 2, 3, 1)),
    ((3, 4), (3, 0), (0, 4)),
    ((900, 1001), (0, 333), (900, 333)),
    ((3, 600_000), (1, 17), (2, 300_001)),
]


@pytest.mark.parametrize(("whole", "begin", "size"), PARTS)
@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_a_part_moves_by_the_bits_of_the_whole(whole: Any, begin: Any, size: Any, noise: str) -> None:
    own = Part(torch.Size(whole), begin, size)
    inside = tuple(slice(first, first + count) for first, count in zip(begin, size, strict=True))
    pieces = list(own.pieces(1 << 18))
    assert [stop for _, stop in pieces[:-1]] == [start for start, _ in pieces[1:]]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        theta = torch.randn(whole, generator=torch.Generator().manual_seed(1)).to(dtype)
        for terms in (((3, 0.5),), ((3, 1e-3), (4, -2e-3))):
            for rounding in (None, 9):
                for change in (
                    Change(),
                    Change("sign", decay=0.75, rate=1e-3),
                    Change("momentum", rate=-0.5, beta=0.5, momentum=torch.ones(whole).view(-1)),
                ):
                    everything = NOISES.resolve(noise).direction("w", theta.shape, terms, Passes(rounding))
                    moved = everything.apply(theta, change, torch.empty_like(theta))
                    if change.momentum is not None:
                        change = Change("momentum", rate=-0.5, beta=0.5, momentum=torch.ones(size).view(-1))
                    one = NOISES.resolve(noise).direction("w", theta.shape, terms, Passes(rounding, part=own))
                    mine = theta[inside].contiguous()
                    one.apply(mine, change)
                    assert torch.equal(mine, moved[inside])
                    assert torch.equal(one.values(mine.shape, mine.device), everything.values(theta.shape, theta.device)[inside])
