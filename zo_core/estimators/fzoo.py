"""One-sided differences, normalised by their spread: FZOO (arXiv 2506.09034, algorithm 1)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..records import Point
from .base import ESTIMATORS, Estimate, Estimator, agree


@ESTIMATORS.register
@dataclass(frozen=True)
class Fzoo(Estimator):
    """``theta -= lr * sum_i (l_i - l_0) / (n sigma) z_i`` with sigma the standard deviation of the l_i.

    The learning rate is a step length: eps and the scale of the loss cancel. One step costs n + 1
    forwards. Sigma over eps is how steep the loss is, and says nothing of its curvature, on which the best length
    depends. Normalised by the curvature, as without a learning rate, steps therefore follow the slopes
    ``(l_i - l_0) / eps``, without sigma, and the rate is a fraction of Newton's step.

    A step is skipped if the losses of all directions agree up to rounding, which is relative to them. The paper's bound
    is a sigma of 1e-8, at any scale, and would skip every step of a small loss.
    """

    name: ClassVar[str] = "fzoo"
    default_eps: ClassVar[float] = 1e-4
    default_num_probes: ClassVar[int] = 8
    min_probes: ClassVar[int] = 2
    slopes: ClassVar[bool] = True

    @property
    def scale_free(self) -> bool:
        return True

    def points(self, seeds: Sequence[int], eps: float) -> tuple[Point, ...]:
        return (Point(seeds[0], 0.0), *(Point(seed, eps) for seed in seeds))

    def estimate(self, losses: Sequence[float], eps: float) -> Estimate:
        baseline, *perturbed = losses
        sigma = statistics.stdev(perturbed)
        grads = tuple((loss - baseline) / eps for loss in perturbed)
        if agree(perturbed):
            return Estimate(grads, (0.0,) * len(grads), f"the losses of all directions agree (sigma {sigma:.1e})")
        return Estimate(grads, tuple((loss - baseline) / sigma for loss in perturbed))
