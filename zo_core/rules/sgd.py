"""Plain stochastic gradient descent along the estimate, the update of MeZO."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..noise import Direction
from ..noise.changes import Change
from .base import RULES, RuleMove
from .decaying import Decaying


@RULES.register
@dataclass(frozen=True)
class Sgd(Decaying):
    """``theta <- (1 - lr * weight_decay) theta - lr * G``, in one pass over the weights, without state.

    Attributes:
        decay_to: what weight decay pulls to: "zero", or with "start" the weights before their first update.
    """

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
        if self.anchored:
            direction.scaled(-lr).apply(theta, Change(**self._decay(theta, state, lr, weight_decay)))
        else:
            direction.scaled(-lr).add_to(theta, decay=1.0 - lr * weight_decay)

    def undo(self, theta: Tensor, state: MutableMapping[str, Any], moves: Sequence[RuleMove]) -> None:
        for _, direction, lr, weight_decay in reversed(moves):
            self._take_back(theta, state, direction.scaled(-lr), self._left(lr, weight_decay))
