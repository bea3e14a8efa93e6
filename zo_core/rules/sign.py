"""Sign descent (ZO-signSGD): every element moves by exactly the learning rate."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from ..noise import Direction
from ..noise.changes import Change
from ..noise.direction import float32
from .base import RULES, RuleMove
from .decaying import Decaying


@RULES.register
@dataclass(frozen=True)
class Sign(Decaying):
    """``theta <- (1 - lr * weight_decay) theta - lr * sign(G)``, without state.

    Attributes:
        decay_to: as for `Sgd`.
    """

    name: ClassVar[str] = "sign"
    elementwise: ClassVar[bool] = True
    scale_free: ClassVar[bool] = True
    undoable: ClassVar[bool] = True

    def update(
        self, theta: Tensor, state: MutableMapping[str, Any], direction: Direction, lr: float, weight_decay: float
    ) -> None:
        direction.apply(theta, Change("sign", rate=float32(-lr), **self._decay(theta, state, lr, weight_decay)))

    def undo(self, theta: Tensor, state: MutableMapping[str, Any], moves: Sequence[RuleMove]) -> None:
        for _, direction, lr, weight_decay in reversed(moves):
            move = partial(_signs, float32(-lr))
            self._take_back(theta, state, direction, self._left(lr, weight_decay), move)


def _signs(rate: float, s: Tensor, start: int, stop: int) -> Tensor:
    return s.sign_().mul_(rate)
