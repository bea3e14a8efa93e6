"""Heavy-ball momentum. It averages directions over steps, at the cost of a second tensor per slot."""

from __future__ import annotations

import math
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..noise import Direction
from ..noise.changes import Change, flush
from ..noise.direction import compute_dtype, float32
from ..noise.reverting import relative
from .base import RULES, RuleMove
from .decaying import Decaying


@RULES.register
@dataclass(frozen=True)
class Momentum(Decaying):
    """``m <- beta m + G``, then ``theta <- (1 - lr * weight_decay) theta - lr m``; m in float32 (or float64).

    Attributes:
        beta: decay of the momentum, in [0, 1).
        decay_to: as for `Sgd`.
    """

    name: ClassVar[str] = "momentum"
    elementwise: ClassVar[bool] = True
    linear: ClassVar[bool] = True
    undoable: ClassVar[bool] = True
    beta: float = 0.9

    @property
    def reach(self) -> float:
        return 1.0 / (1.0 - self.beta)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.beta < 1.0:
            raise ValueError(f"beta={self.beta!r} must be at least 0 and below 1, for example 0.9")

    def state(self, theta: Tensor) -> dict[str, tuple[torch.Size, torch.dtype]]:
        return {"momentum": (theta.shape, compute_dtype(theta.dtype)), **super().state(theta)}

    def update(
        self, theta: Tensor, state: MutableMapping[str, Any], direction: Direction, lr: float, weight_decay: float
    ) -> None:
        direction.apply(
            theta,
            Change(
                "momentum",
                rate=float32(-lr),
                beta=float32(self.beta),
                momentum=self._momentum(theta, state),
                **self._decay(theta, state, lr, weight_decay),
            ),
        )

    def _momentum(self, theta: Tensor, state: MutableMapping[str, Any]) -> Tensor:
        if "momentum" not in state:
            with torch.inference_mode(False):
                shape, dtype = self.state(theta)["momentum"]
                state["momentum"] = torch.zeros(shape, dtype=dtype, device=theta.device)
        return state["momentum"].view(-1)

    def undo(self, theta: Tensor, state: MutableMapping[str, Any], moves: Sequence[RuleMove]) -> None:
        """As for every rule. The momentum is zero afterwards.

        Going back through the momentum itself would divide its rounding errors by beta in each step. But the weights
        are linear in the estimates: ``theta_n = D theta_0 - sum_i A_i G_i - (what was left of the momentum before)``,
        and with an anchor so are their distances from it.
        The sum is formed in the tensor of the momentum and added back at once. What the momentum of before the first
        of these moves still moved is not known any more, and is not reverted.
        """
        flush()
        momentum = self._momentum(theta, state).zero_()
        last = moves[-1][1]
        if relative(last):
            total = self._factor(momentum, moves)
            self._take_back(theta, state, last, 1.0, lambda s, start, stop: total[start:stop] - 1.0)
        else:
            left = math.prod(self._left(lr, weight_decay) for _, _, lr, weight_decay in moves)
            unit = left if self.anchored else 1.0  # what an anchor has pulled back is taken away first
            for (_, direction, _, _), amount in _amounts(moves):
                for start, stop, s in direction.scaled(-amount / unit).chunks(theta.numel(), theta.device):
                    momentum[start:stop].add_(s)
            self._take_back(theta, state, last, left, lambda s, start, stop: momentum[start:stop])
        momentum.zero_()

    def _factor(self, momentum: Tensor, moves: Sequence[RuleMove]) -> Tensor:
        """What relative scales were multiplied by, float64; ``momentum`` is overwritten."""
        total = torch.ones_like(momentum, dtype=torch.float64)
        for rule, direction, lr, weight_decay in moves:
            assert isinstance(rule, Momentum)
            beta, rate, decay = float32(rule.beta), float32(-lr), float32(1.0 - lr * weight_decay)
            for start, stop, s in direction.chunks(momentum.numel(), momentum.device):
                m = momentum[start:stop].mul_(beta).add_(s)
                total[start:stop].mul_((m * rate).double().add_(decay))
        return total


def _amounts(moves: Sequence[RuleMove]) -> Iterator[tuple[RuleMove, float]]:
    """For each move, the last one first: how much of its ``G`` the weights have lost."""
    amount, decay, beta = 0.0, 1.0, 0.0
    for move in reversed(moves):
        rule, _, lr, weight_decay = move
        assert isinstance(rule, Momentum)
        left = rule._left(lr, weight_decay)
        amount = beta * amount + decay * lr * (left if rule.anchored else 1.0)  # an anchor pulls after the update
        decay *= left
        beta = float32(rule.beta)
        yield move, amount
