"""Simultaneous perturbation, two-sided: the estimator of MeZO (arXiv 2305.17333, definition 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..records import Point
from .base import ESTIMATORS, Estimate, Estimator


@ESTIMATORS.register
@dataclass(frozen=True)
class Spsa(Estimator):
    """``g_i = (L(theta + eps z_i) - L(theta - eps z_i)) / (2 eps)``; the update is the mean of ``g_i z_i``."""

    name: ClassVar[str] = "spsa"
    default_eps: ClassVar[float] = 1e-3

    @property
    def two_sided(self) -> bool:
        return True

    def points(self, seeds: Sequence[int], eps: float) -> tuple[Point, ...]:
        return tuple(Point(seed, side * eps) for seed in seeds for side in (1.0, -1.0))

    def estimate(self, losses: Sequence[float], eps: float) -> Estimate:
        pairs = zip(losses[::2], losses[1::2], strict=True)
        grads = tuple((plus - minus) / (2.0 * eps) for plus, minus in pairs)
        return Estimate(grads, grads)
