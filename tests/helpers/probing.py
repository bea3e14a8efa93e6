"""Measures losses at a few points, and sets weights to a point in the obvious way."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from zo_core import NOISES, ElementNoise, Point, ZeroOrder

EPS = 1e-2
#: Noises whose `z` is the direction of a slot; those of the others depend on its shape, its block or its weights.
PLAIN = [name for name in NOISES if isinstance(NOISES.resolve(name), ElementNoise)]
POINTS = (Point(11, EPS), Point(11, -EPS), Point(12, 0.0), Point(12, 3 * EPS))


def measure(model: nn.Module, loss: Callable[[], object], points: tuple[Point, ...] = POINTS) -> list[float]:
    """The losses that the oracle measures at the points."""
    return [value.item() for value in ZeroOrder(model).oracle.losses(points, loss)]


def moved(model: nn.Module, point: Point, noise: str = "rademacher") -> nn.Module:
    """A copy in eval mode whose weights were set to theta + scale * z."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for slot in ZeroOrder(other).slots:
            z = NOISES.resolve(noise).z(point.seed, slot.key, 0, slot.tensor.numel(), scale=point.scale)
            slot.tensor.copy_(slot.tensor.float() + z.view(slot.tensor.shape))
    return other.eval()


def counted(loss: Callable[[], object], calls: list[int]) -> Callable[[], object]:
    """The closure, which also records each call."""

    def run() -> object:
        calls.append(1)
        return loss()

    return run
