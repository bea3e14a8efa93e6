"""Plain stochastic gradient descent along the estimate, the update of MeZO."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..noise import Direction
from ..noise.direction import float32
from ..noise.reverting import take_back
from .base import RULES, RuleMove, UpdateRule


@RULES.register
@dataclass(frozen=True)
class Sgd(UpdateRule):
    """``theta <- (1 - lr * weight_decay) theta - lr * G``, in one pass over the weights, without state."""

    name: ClassVar[str] = "sgd"
    elementwise: ClassVar[bool] = True
    linear: ClassVar[bool] = True
    undoable: ClassVar[bool] = True

    @property
    def reach(self) -> float:
        return 1.0

    def update(
        self, theta: Tensor, state: MutableMapping[str, Any], direction: Direction, lr: float, weight_decay: float
    ) -> None:
        direction.scaled(-lr).add_to(theta, decay=1.0 - lr * weight_decay)

    def undo(self, theta: Tensor, state: MutableMapping[str, Any], moves: Sequence[RuleMove]) -> None:
        for _, direction, lr, weight_decay in reversed(moves):
            take_back(theta, direction.scaled(-lr), float32(1.0 - lr * weight_decay))
