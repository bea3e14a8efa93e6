"""Heavy-ball momentum. It averages directions over steps, at the cost of a second tensor per slot."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..noise import Direction
from ..noise.direction import compute_dtype, float32, rewrite
from .base import RULES, UpdateRule


@RULES.register
@dataclass(frozen=True)
class Momentum(UpdateRule):
    """``m <- beta m + G``, then ``theta <- (1 - lr * weight_decay) theta - lr m``; m in float32 (or float64).

    Attributes:
        beta: decay of the momentum, in [0, 1).
    """

    name: ClassVar[str] = "momentum"
    elementwise: ClassVar[bool] = True
    linear: ClassVar[bool] = True
    beta: float = 0.9

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta < 1.0:
            raise ValueError(f"beta={self.beta!r} must be at least 0 and below 1, for example 0.9")

    def state(self, theta: Tensor) -> dict[str, tuple[torch.Size, torch.dtype]]:
        return {"momentum": (theta.shape, compute_dtype(theta.dtype))}

    def update(
        self, theta: Tensor, state: MutableMapping[str, Any], direction: Direction, lr: float, weight_decay: float
    ) -> None:
        if "momentum" not in state:
            with torch.inference_mode(False):
                shape, dtype = self.state(theta)["momentum"]
                state["momentum"] = torch.zeros(shape, dtype=dtype, device=theta.device)
        momentum = state["momentum"].view(-1)
        beta, rate, decay = float32(self.beta), float32(-lr), float32(1.0 - lr * weight_decay)

        def change(weights: Tensor, s: Tensor, start: int, stop: int) -> None:
            m = momentum[start:stop].mul_(beta).add_(s)
            if decay != 1.0:
                weights.mul_(decay)
            weights.add_(m * rate)

        rewrite(theta, direction, change)
