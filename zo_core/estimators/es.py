"""Evolution strategies: scores of a population of perturbed weights, compared with one another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from ..records import Point
from .base import ESTIMATORS, Estimate, Estimator, agree, rounding

SHAPINGS = ("center", "zscore", "ranks")


@ESTIMATORS.register
@dataclass(frozen=True)
class Es(Estimator):
    """``theta -= lr * mean_i(c_i z_i)``, with ``c_i`` from comparing the losses at all ``theta + eps z_i``.

    OpenAI-ES (arXiv 1703.03864) and its use on language models (arXiv 2509.24372, 2511.16652). With the losses
    ``l_i`` of a population of n, ``shaping`` is one of

    * ``"center"``: ``c_i = (l_i - mean of the others) / eps``, an unbiased estimate of the gradient of the smoothed
      loss. The learning rate means what it does with "spsa".
    * ``"zscore"``: ``c_i = (l_i - mean) / std``, with the sample standard deviation.
    * ``"ranks"``: the same of the ranks of the losses, equal losses sharing the mean of theirs. An outlier counts as
      no more than the largest.

    With the last two eps and the scale of the loss cancel, and the learning rate is a step length. One step costs a
    forward per direction. Where several processes have batches of their own, each has a population of its own. A
    population without differences is skipped.

    Attributes:
        shaping: how losses are compared.
        antithetic: whether each direction is measured on both sides; the population is then twice the number of
            directions, and the coefficient of a direction is half the difference of its two sides. With "center" that
            is "spsa".
    """

    name: ClassVar[str] = "es"
    default_eps: ClassVar[float] = 1e-3
    default_num_probes: ClassVar[int] = 30
    min_probes: ClassVar[int] = 2
    compares: ClassVar[bool] = True
    shaping: str = "zscore"
    antithetic: bool = False

    def __post_init__(self) -> None:
        if self.shaping not in SHAPINGS:
            raise ValueError(
                f"shaping={self.shaping!r} of estimator 'es' is not known; "
                f"write one of {', '.join(map(repr, SHAPINGS))}"
            )
        if not isinstance(self.antithetic, bool):
            raise ValueError(f"antithetic={self.antithetic!r} of estimator 'es' must be True or False")

    @property
    def scale_free(self) -> bool:
        return self.shaping != "center"

    @property
    def two_sided(self) -> bool:
        return self.antithetic

    def points(self, seeds: Sequence[int], eps: float) -> tuple[Point, ...]:
        sides = (1.0, -1.0) if self.antithetic else (1.0,)
        return tuple(Point(seed, side * eps) for seed in seeds for side in sides)

    def estimate(self, losses: Sequence[float], eps: float) -> Estimate:
        grads = _half_differences(losses, eps) if self.antithetic else ()
        if agree(losses):
            count = len(losses) // (2 if self.antithetic else 1)
            return Estimate(grads, (0.0,) * count, f"all {len(losses)} scores of the population agree")
        if self.antithetic:
            return Estimate(grads, _half_differences(self._shaped(losses), 1.0) if self.scale_free else grads)
        unit = 1.0 if self.scale_free else eps
        return Estimate(grads, tuple(value / unit for value in self._shaped(losses)))

    def _shaped(self, losses: Sequence[float]) -> list[float]:
        """How each loss compares with the others, 0 on average."""
        values = _ranks(losses) if self.shaping == "ranks" else losses
        count = len(values)
        mean = math.fsum(values) / count
        apart = [value - mean for value in values]
        if self.shaping == "center":
            return [value * (count / (count - 1)) for value in apart]  # from the mean of the others
        std = math.sqrt(math.fsum(value * value for value in apart) / (count - 1))
        return [value / std for value in apart]


def _half_differences(values: Sequence[float], eps: float) -> tuple[float, ...]:
    return tuple((plus - minus) / (2.0 * eps) for plus, minus in zip(values[::2], values[1::2], strict=True))


def _ranks(losses: Sequence[float]) -> list[float]:
    """The rank of each loss, from 0; equal ones have the mean of their ranks."""
    order = sorted(range(len(losses)), key=losses.__getitem__)
    same = rounding(losses)
    starts = [0, *(i for i, (a, b) in enumerate(pairwise(order), 1) if losses[b] - losses[a] > same), len(order)]
    ranks = [0.0] * len(losses)
    for start, stop in pairwise(starts):
        for index in order[start:stop]:
            ranks[index] = (start + stop - 1) / 2.0
    return ranks
