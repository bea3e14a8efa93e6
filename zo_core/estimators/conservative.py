"""A step that is only taken if it lowers the loss: the conservative variant of ZO-SGD (ZO-Bench, arXiv 2402.11592)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from .base import ESTIMATORS
from .spsa import Spsa


@ESTIMATORS.register
@dataclass(frozen=True)
class Conservative(Spsa):
    """SPSA that then measures the loss at ``theta - lr g z``, ``theta`` and ``theta + lr g z``, and keeps the best.

    Of equal losses the first counts: a step may be too small for its effect to show in a float32 loss. With several
    directions, ``g z`` is the mean over them. Weight decay comes after the choice. A step costs three forwards more.
    """

    name: ClassVar[str] = "conservative"
    multiples: ClassVar[tuple[float, ...]] = (1.0, 0.0, -1.0)

    def choose(self, losses: Sequence[float]) -> float:
        return self.multiples[min(range(len(losses)), key=losses.__getitem__)]
