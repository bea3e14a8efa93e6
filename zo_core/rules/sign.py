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
from ..noise.reverting import take_back
from .base import RULES, RuleMove, UpdateRule


@RULES.register
@dataclass(frozen=True)
class Sign(UpdateRule):
    """``theta <- (1 - lr * weight_decay) theta - lr * sign(G)``, without state."""

    name: ClassVar[str] = "sign"
    elementwise: ClassVar[bool] = True
    scale_free: ClassVar[bool] = True
    undoable: ClassVar[bool] = True

    def update(
        self, theta: Tensor, state: MutableMapping[str, Any], direction: Direction, lr: float, weight_decay: float
    ) -> None:
        direction.apply(theta, Change("sign", decay=float32(1.0 - lr * weight_decay), rate=float32(-lr)))

    def undo(self, theta: Tensor, state: MutableMapping[str, Any], moves: Sequence[RuleMove]) -> None:
        for _, direction, lr, weight_decay in reversed(moves):
            rate, decay = float32(-lr), float32(1.0 - lr * weight_decay)
            take_back(theta, direction, decay, partial(_signs, rate))


def _signs(rate: float, s: Tensor, start: int, stop: int) -> Tensor:
    return s.sign_().mul_(rate)
