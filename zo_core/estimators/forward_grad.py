"""Exact directional derivatives: the forward gradient (Baydin et al., arXiv 2202.08587; ZO-Bench, arXiv 2402.11592)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..records import Point
from .base import ESTIMATORS
from .spsa import Spsa


@ESTIMATORS.register
@dataclass(frozen=True)
class ForwardGrad(Spsa):
    """``g_i = z_i . grad L(theta)``, by forward-mode automatic differentiation; the update is the mean of ``g_i z_i``.

    The limit of "spsa" for eps to 0: without the error that curvature makes, and without the cancellation of two
    losses. It is written as "spsa" on the tangent of the loss, so that eps is the unit of the groups and no more. One
    forward per direction carries the derivative of every activation beside its value. That is about the arithmetic of
    three forwards, and no activation is kept for a backward pass.

    The derivative is that of autograd: ``detach()`` ends it. Weights have to be ordinary, and every operation
    needs a forward derivative.
    """

    name: ClassVar[str] = "forward_grad"
    differentiates: ClassVar[bool] = True

    @property
    def two_sided(self) -> bool:
        return False  # the two sides of a tangent say nothing of curvature

    def points(self, seeds: Sequence[int], eps: float) -> tuple[Point, ...]:
        return tuple(Point(seed, side * eps, linear=True) for seed in seeds for side in (1.0, -1.0))
