"""Laws of parts of tensors: a process that holds one computes the bits that the whole tensor has there."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from zo_core.noise import NOISES, Passes
from zo_core.noise.changes import Change
from zo_core.noise.parts import Part
from zo_core.noise.reverting import take_back

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
    ((2, 600_000), (0, 17), (2, 300_001)),
]
TERMS = ((3, 0.5),), ((3, 1e-3), (4, -2e-3))


def changes(shape: Any) -> list[Change]:
    momentum = torch.ones(shape).view(-1)
    return [
        Change(),
        Change("sign", decay=0.75, rate=1e-3),
        Change("momentum", rate=-0.5, beta=0.5, momentum=momentum),
    ]


@pytest.mark.parametrize(("whole", "begin", "size"), PARTS)
@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_a_part_moves_by_the_bits_of_the_whole(whole: Any, begin: Any, size: Any, noise: str) -> None:
    part = Part(torch.Size(whole), begin, size)
    inside = tuple(slice(first, first + count) for first, count in zip(begin, size, strict=True))
    pieces = list(part.pieces(1 << 18))
    assert [stop for _, stop in pieces[:-1]] == [start for start, _ in pieces[1:]]
    of, z = NOISES.resolve(noise), NOISES.resolve(noise).values(3, "w", torch.Size(whole))
    mine = of.direction("w", torch.Size(whole), ((3, 1.0),), Passes(part=part))
    assert torch.equal(mine.values(torch.Size(size), z.device), z[inside])
    for dtype, (rounding, terms) in product((torch.float32, torch.bfloat16, torch.float16), zip((None, 9), TERMS)):  # noqa: B905
        theta = torch.randn(whole, generator=torch.Generator().manual_seed(1)).to(dtype)
        every = of.direction("w", theta.shape, terms, Passes(rounding))
        mine = of.direction("w", theta.shape, terms, Passes(rounding, part=part))
        for change, own in zip(changes(whole), changes(size), strict=True):
            moved, held = every.apply(theta, change, theta.clone()), theta[inside].contiguous()
            mine.apply(held, own)
            assert torch.equal(held, moved[inside])
        take_back(moved, every, 1.0)
        take_back(held, mine, 1.0)
        assert torch.equal(held, moved[inside])
