"""Normal directions, for parity with MeZO, through one table of the inverse distribution function.

Sixteen hash bits choose one of 65,536 equally likely quantiles. Values come from integers, never
from a transcendental function at run time: eager and compiled versions of the Box-Muller formula
differ in a quarter of the values, and a table cannot differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar

import torch
from torch import Tensor

from ..cache import kept
from .base import NOISES, ElementNoise

LEVELS = 1 << 16


@kept(1 << 20)
def quantiles() -> Tensor:
    """The 65,536 values, float32 on the CPU: quantile midpoints, scaled to unit variance."""
    normal = NormalDist()
    half = torch.tensor([normal.inv_cdf((k + 0.5) / LEVELS) for k in range(LEVELS // 2)], dtype=torch.float64)
    half = half / half.square().mean().sqrt()
    return torch.cat([half, -half.flip(0)]).to(torch.float32)


@kept(4 << 20)
def table(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return quantiles().to(device)


@NOISES.register
@dataclass(frozen=True)
class Gaussian(ElementNoise):
    """Standard normal on 65,536 levels, |z| < 4.33; half-word ``i % 2`` of word ``i // 2`` picks element i."""

    name: ClassVar[str] = "gaussian"
    values_per_word: ClassVar[int] = 2
    variance: ClassVar[float] = 1.0
    kurtosis: ClassVar[float] = 2.99925

    def expand(self, bits: Tensor, scale: float, out: Tensor) -> None:
        index = bits.view(torch.int16).to(torch.int32).bitwise_and_(LEVELS - 1)
        torch.index_select(table(bits.device), 0, index, out=out)
        out.mul_(scale)
