"""What an estimator is: two pure functions that never see a parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..records import Point
from ..registry import Registry

#: Losses that differ by less than this fraction of themselves are equal: a sum in another order differs by as much.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Estimate:
    """What was learnt from the losses of one step.

    Attributes:
        projected_grads: directional derivative along each direction, loss per unit of ``z``; empty if the losses
            were only compared with one another.
        coefficients: factor of each direction in the update, before clipping and before the mean
            over directions.
        skip: why these losses give no direction to move in, or None.
    """

    projected_grads: tuple[float, ...]
    coefficients: tuple[float, ...]
    skip: str | None = None


@dataclass(frozen=True)
class Estimator:
    """How losses at a few points become probes.

    Class attributes:
        default_eps, default_num_probes: used where the configuration leaves them open.
        min_probes: fewest directions for which the estimate is defined.
        scale_free: whether the scale of the loss cancels in the coefficients.
        slopes: of scale-free ones: whether steps that are normalised by the curvature follow the projected gradients
            instead of the coefficients; the scale of the loss then cancels in the normaliser.
        compares: whether losses of different directions are compared, which takes losses on the same data: directions
            that other processes have measured on data of their own are then estimated by themselves.
        multiples: with any, a step has a second round: the loss is measured at the weights that each multiple of the
            step would lead to, on the same data and with the same random numbers, and `choose` decides on one of them.
        differentiates: whether the points are on tangents of the loss, which takes ordinary weights, and operations
            with a forward derivative.
    """

    name: ClassVar[str]
    default_eps: ClassVar[float]
    default_num_probes: ClassVar[int] = 1
    min_probes: ClassVar[int] = 1
    slopes: ClassVar[bool] = False
    compares: ClassVar[bool] = False
    multiples: ClassVar[tuple[float, ...]] = ()
    differentiates: ClassVar[bool] = False

    @property
    def scale_free(self) -> bool:
        return False

    @property
    def two_sided(self) -> bool:
        """Whether the points are the two sides of each direction in turn, at the same distance, and no others."""
        return False

    def points(self, seeds: Sequence[int], eps: float) -> tuple[Point, ...]:
        """The points to measure, given one seed per direction."""
        raise NotImplementedError

    def estimate(self, losses: Sequence[float], eps: float) -> Estimate:
        """The estimate from the losses at those points, in the same order; all of them are finite."""
        raise NotImplementedError

    def choose(self, losses: Sequence[float]) -> float:
        """The multiple of the step to take.

        Args:
            losses: those of the second round, one for each of `multiples`; infinite where a loss was not finite.
        """
        raise NotImplementedError


def rounding(losses: Sequence[float]) -> float:
    """The largest difference that is one of rounding."""
    return ROUNDING * max(map(abs, losses))


def agree(losses: Sequence[float]) -> bool:
    """Whether losses differ by no more than rounding, whatever their scale."""
    return max(losses) - min(losses) <= rounding(losses)


ESTIMATORS: Registry[Estimator] = Registry("estimator", Estimator)
