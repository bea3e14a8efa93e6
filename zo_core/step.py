"""The step in progress as a value, and what was learnt from its losses."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .estimators import Estimate, Estimator
from .exchange import Exchange
from .noise.direction import FLOAT32_MAX, float32
from .records import Point, Probe
from .targets import Slot

logger = logging.getLogger(__name__)


@dataclass
class StepPlan:
    """What a step measures, and what it has measured so far.

    Attributes:
        step: index of the step.
        seeds: one per direction.
        points: the points to measure, for all directions: the estimator's, then those of the normaliser.
        mine: indices of the points that this process measures; see `Exchange`.
        ratios: by slot, its eps in units of the step's.
        sums: float64 tensors of shape ``[]``, one for each of ``mine``: losses, summed over micro-batches.
        extra: how many of the points are the normaliser's.
        thresholds: thresholds of masks that this step needed first; they take effect with its update.
        probes: in a second round, the step whose multiples are measured: the scale of a point is the multiple.
        rates: in a second round, the learning rate by slot.
        gathered: losses at all points, once they are known.
        own: those at the estimator's points; all of them if one is not finite, to be shown.
        tried: losses of the second round; None before it.
        failed: why a loss could not be had; empty if all could, as far as this process knows.
        random: state of the global random generators before the first measurement.
        looks_again: whether a failed query has kept the first step from checking the closure.
    """

    step: int
    seeds: tuple[int, ...]
    points: tuple[Point, ...]
    mine: tuple[int, ...]
    ratios: dict[Slot, float]
    extra: int = 0
    sums: list[Tensor] = field(default_factory=list)
    thresholds: dict[str, float] = field(default_factory=dict)
    probes: tuple[Probe, ...] = ()
    rates: dict[Slot, float] = field(default_factory=dict)
    gathered: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    tried: list[float] | None = None
    failed: str = ""
    random: dict[str, Any] = field(default_factory=dict)
    looks_again: bool = False

    @property
    def to_measure(self) -> list[Point]:
        """The points of ``mine``."""
        return [self.points[index] for index in self.mine]

    def add(self, losses: Sequence[Tensor]) -> None:
        """Adds the losses of a micro-batch, one for each of ``mine``."""
        self.gathered, self.tried = [], None
        self.sums = [a + b for a, b in zip(self.sums, losses, strict=True)] if self.sums else list(losses)

    def losses(self) -> list[float]:
        """The sums as numbers; synchronises with the device."""
        numbers: list[float] = torch.stack(self.sums).tolist()
        return numbers

    def gather(self, exchange: Exchange) -> list[float]:
        """The losses at all points, with those of other processes, which are waited for the first time."""
        if not self.gathered:
            rows = exchange.gather(self.points, self.seeds, self.step, [] if self.failed else self.losses())
            failed = [f"rank {rank}" for rank, row in enumerate(rows) if not row]
            if failed:
                self.failed = self.failed or f"a query failed on {', '.join(failed)}"
                self.gathered = self.own = [math.nan] * len(self.points)
                return self.gathered
            self.gathered = exchange.combine(self.points, rows)
            finite = all(map(math.isfinite, self.gathered))
            self.own = exchange.combine(self.points[: len(self.points) - self.extra], rows) if finite else self.gathered
        return self.gathered


def mean(losses: Sequence[float]) -> float:
    """The mean of finite numbers, else NaN."""
    return math.fsum(losses) / len(losses) if all(map(math.isfinite, losses)) else float("nan")


def probes_from(
    estimator: Estimator,
    eps: float,
    bound: float,
    seeds: tuple[int, ...],
    losses: list[float],
    populations: int = 1,
    *,
    curvature: bool = False,
) -> tuple[Estimate, tuple[Probe, ...], int]:
    """Turns the losses of a step into the probes to apply.

    Args:
        estimator: turns losses into coefficients.
        eps: distance of the probes.
        bound: largest absolute coefficient of a direction.
        seeds: one per direction.
        losses: one per point.
        populations: see `Exchange`.
        curvature: whether the step will be normalised by the curvature.

    Returns:
        The estimate, the probes with the mean over the directions in their coefficients, and how many of
        them were clipped. There are no probes if the step is to be skipped.
    """
    if not all(map(math.isfinite, losses)):
        shown = ", ".join(f"{loss:.4g}" for loss in losses)
        return Estimate((), (), f"a loss is not finite (losses of the probes: {shown})"), (), 0
    estimate = _estimate(estimator, losses, eps, populations)
    if estimate.skip is not None:
        return estimate, (), 0
    followed = estimate.projected_grads if curvature and estimator.slopes else estimate.coefficients
    clipped = sum(abs(c) > bound for c in followed)
    coefficients = [max(-bound, min(bound, c)) / len(seeds) for c in followed]
    if not all(abs(c) <= FLOAT32_MAX for c in coefficients):
        return unfit(coefficients), (), 0
    # A float32 from here on, so that a log or another process gets exactly what is applied.
    probes = tuple(Probe(seed, float32(c)) for seed, c in zip(seeds, coefficients, strict=True))
    return estimate, probes, clipped


def _estimate(estimator: Estimator, losses: list[float], eps: float, populations: int) -> Estimate:
    """The estimate of all losses, or of each population by itself if the estimator compares its members."""
    if not estimator.compares or populations == 1:
        return estimator.estimate(losses, eps)
    size = len(losses) // populations
    parts = [estimator.estimate(losses[at : at + size], eps) for at in range(0, len(losses), size)]
    return Estimate(
        tuple(chain.from_iterable(part.projected_grads for part in parts)),
        tuple(chain.from_iterable(part.coefficients for part in parts)),
        parts[0].skip if all(part.skip is not None for part in parts) else None,
    )


def chosen(estimator: Estimator, estimate: Estimate, losses: Sequence[float]) -> tuple[Estimate, float]:
    """The multiple of the step to take after a second round with these losses; a skip if none of them is finite."""
    if not any(map(math.isfinite, losses)):
        return Estimate((), (), "no loss of the second round is finite"), 0.0
    return estimate, estimator.choose([loss if math.isfinite(loss) else math.inf for loss in losses])


def can_be_applied(coefficients: Sequence[float], multipliers: Sequence[float], normaliser: float) -> bool:
    """Whether all numbers of a step, and what the update multiplies them to, are in the range of float32.

    Args:
        coefficients: one per direction; all NaN in a skipped step.
        multipliers: learning rates, weight decays, and ratios of eps.
        normaliser: state of the normaliser after the step.
    """
    if not (all(map(math.isfinite, multipliers)) and 0.0 <= normaliser < math.inf):
        return False
    largest = max(1.0, *map(abs, multipliers))
    largest *= largest * len(coefficients)  # a rate times another of them
    coefficients = () if math.isnan(coefficients[0]) else coefficients
    return all(abs(coefficient) * largest < FLOAT32_MAX for coefficient in (1.0, *coefficients))


def unfit(coefficients: Sequence[float]) -> Estimate:
    """Skips a step whose update leaves the range of float32."""
    shown = ", ".join(f"{c:.4g}" for c in coefficients)
    return Estimate((), (), f"a coefficient does not fit float32 ({shown})")


def too_much_decay(taken: float) -> Estimate:
    """Skips a step whose weight decay takes the weights beyond what they are pulled to."""
    return Estimate((), (), f"weight decay would take away {taken:.3g} times the weights; lower weight_decay or lr")


def times(probe: Probe, multiple: float) -> Probe:
    """A multiple of a probe, as a log holds it."""
    return Probe(probe.seed, float32(probe.coefficient * multiple) + 0.0)  # no negative zero


class Skips:
    """Logs skipped steps; a diverged run skips every step, so warnings come at powers of two."""

    def __init__(self) -> None:
        self.count = 0

    def log(self, step: int, estimate: Estimate) -> None:
        """Logs a step that moves nothing; losses that agree are normal for a converged model, and no warning."""
        said = f"step {step} skipped, weights untouched: {estimate.skip}"
        if estimate.coefficients:
            logger.info("%s", said)
            return
        self.count += 1
        if self.count & (self.count - 1) == 0:
            logger.warning("%s%s", said, f" ({self.count} steps skipped so far)" if self.count > 1 else "")
