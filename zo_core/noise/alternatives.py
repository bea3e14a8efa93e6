"""Several directions of one slot at once, one for each probe of a step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .direction import Direction, compute_dtype, float32
from .hashing import sent
from .rounding import store


@dataclass(frozen=True)
class Alternatives:
    """Several directions of one slot, one for each probe of a step; the terms of a `Direction` are a sum instead.

    Attributes:
        common: what they have in common: a direction without terms.
        terms: a pair ``(seed, c)`` for each of them.
    """

    common: Direction
    terms: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, direction: Direction) -> Alternatives:
        """The terms of a direction as separate directions."""
        return cls(replace(direction, terms=()), direction.terms)


def stacked_values(theta: Tensor, alternatives: Alternatives) -> Tensor:
    """``round(theta + s)`` for each of several directions, as `Direction.add_to` rounds it.

    Args:
        theta: the values of the slot, with few elements.
        alternatives: directions of a noise with signs.

    Returns:
        ``[len(terms), *theta.shape]`` in the type of ``theta``.
    """
    noise, slot = alternatives.common.noise, alternatives.common.slot
    terms, device = alternatives.terms, theta.device
    places = {seed: place for place, seed in enumerate(dict.fromkeys(seed for seed, _ in terms))}
    z = noise.stack(tuple(places), slot, theta.numel(), device)
    scales = sent([float32(c) for _, c in terms], device)
    s = z[sent([places[seed] for seed, _ in terms], device)].mul_(scales[:, None])
    moved, key = theta.reshape(-1).to(compute_dtype(theta.dtype)) + s, alternatives.common.rounding_key(theta.dtype)
    if key is None:
        return moved.to(theta.dtype).view(-1, *theta.shape)
    values = torch.empty_like(moved, dtype=theta.dtype)
    for each, out in zip(moved, values, strict=True):
        store(each, out, key, 0)
    return values.view(-1, *theta.shape)
