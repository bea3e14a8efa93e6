"""The records that are passed between modules: what to measure, what was learnt, what was done.

They are plain values. A `Probe` is the only thing that has to cross a process, a disk or a
checkpoint, because its direction can be regenerated from its seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Point:
    """A point at which the loss is measured: ``theta + scale * z(seed)``.

    Attributes:
        seed: seed of the direction ``z``.
        scale: signed distance along ``z``, a multiple of eps; 0.0 is the unperturbed model.
        linear: take the value there of the tangent ``L(theta) + scale * z . grad L`` instead of that of the loss.
    """

    seed: int
    scale: float
    linear: bool = False


@dataclass(frozen=True)
class Probe:
    """One measured direction: the update moves the weights by ``-lr * coefficient * z(seed)``.

    The engine's coefficients are float32 values, so that four bytes hold them exactly.
    """

    seed: int
    coefficient: float


@dataclass(frozen=True)
class Rollback:
    """A step at which the loss had risen, and that went back to better weights instead of moving on.

    Attributes:
        to: the updates of this step and of all later ones were reverted.
        factor: what learning rates are multiplied by from the next step on.
    """

    to: int
    factor: float


@dataclass(frozen=True)
class Scores:
    """What the closures of a step returned, over all perturbed weights at which they were called.

    Attributes:
        mean, std, min, max: of the scores; with several micro-batches, of their sums. The standard deviation is that
            of a sample.
    """

    mean: float
    std: float
    min: float
    max: float

    @classmethod
    def of(cls, losses: Sequence[float], *, maximize: bool) -> Scores | None:
        """The scores of losses that an oracle has measured; None if one of them is not finite."""
        if not all(map(math.isfinite, losses)):
            return None
        scores = [0.0 - loss for loss in losses] if maximize else losses
        mean = math.fsum(scores) / len(scores)
        square = math.fsum((score - mean) * (score - mean) for score in scores)
        return cls(mean, math.sqrt(square / max(1, len(scores) - 1)), min(scores), max(scores))


@dataclass(frozen=True, eq=False)
class StepRecord(float):
    """What one step did. It *is* a float, the loss, so ``f"{record:.3f}"`` and ``sum`` just work.

    Attributes:
        loss: mean loss over the probes, summed over the micro-batches of the step. With ``maximize``, minus the score.
        projected_grad: mean over the directions of the directional derivative along ``z``, in loss
            per unit of ``z`` (MeZO, arXiv 2305.17333, eq. 2); before clipping. NaN if losses are only compared with one
            another, as by a one-sided "es".
        lr: learning rate of the first parameter group as it was applied, that is, as the brake has lowered it; NaN if
            its optimizer has none and sets its own steps, as Adafactor does with ``lr=None``. (A seed log stores 0.0
            for it.)
        step: index of the step, from 0.
        seed: seed of the first direction.
        probes: the directions as they were applied; empty if the step was skipped.
        clipped: number of directions whose coefficient was clipped.
        skipped: why the weights were left alone, or None.
        normaliser: state of the step normaliser after the step (its running mean); None without one.
        rollback: set if the brake reverted earlier updates at this step.
        scores: what the closures returned, with the estimator "es" and with ``maximize``; else, and where one
            was not finite, None.
        failed: whether the step was skipped without a loss, because a query failed (`QueryError`) or by
            `ZeroOrder.skip`. That says nothing of the loss.
    """

    loss: float
    projected_grad: float
    lr: float
    step: int
    seed: int
    probes: tuple[Probe, ...] = ()
    clipped: int = 0
    skipped: str | None = None
    normaliser: float | None = None
    rollback: Rollback | None = None
    scores: Scores | None = None
    failed: bool = False

    @property
    def without_signal(self) -> bool:
        """Whether the step led nowhere: all losses agreed exactly, or a second round found no better weights."""
        return bool(self.probes) and not any(probe.coefficient for probe in self.probes)

    def __new__(cls, loss: float, *args: Any, **kwargs: Any) -> StepRecord:
        return float.__new__(cls, loss)

    def __getnewargs__(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    def as_dict(self) -> dict[str, Any]:
        """The record as plain values, for logging."""
        return asdict(self)
