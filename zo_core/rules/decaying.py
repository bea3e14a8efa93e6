"""Decoupled weight decay of the library's own rules: towards zero, or towards the weights that training began with."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..noise import Direction
from ..noise.changes import flush
from ..noise.direction import float32
from ..noise.reverting import take_back
from .base import ANCHOR, UpdateRule

ENDS = ("zero", "start")


@dataclass(frozen=True)
class Decaying(UpdateRule):
    """A rule whose weight decay pulls the weights towards zero, or towards what they were at the start.

        "zero":   theta <- (1 - lr * weight_decay) theta, before the update
        "start":  theta <- theta - lr * weight_decay * (theta - theta_0), after the update (arXiv 2605.30148)

    Here theta_0 is the slot before its first update: a copy in its own dtype, part of the rule's state.

    Attributes:
        decay_to: ``"zero"`` or ``"start"``.
    """

    decay_to: str = field(default="zero", kw_only=True, metadata={"since": "0.2"})

    def __post_init__(self) -> None:
        if self.decay_to not in ENDS:
            raise ValueError(f"decay_to={self.decay_to!r} is not known; write one of {', '.join(map(repr, ENDS))}")

    @property
    def anchored(self) -> bool:
        return self.decay_to == "start"

    def state(self, theta: Tensor) -> dict[str, tuple[torch.Size, torch.dtype]]:
        return {ANCHOR: (theta.shape, theta.dtype)} if self.anchored else {}

    def _decay(self, theta: Tensor, state: MutableMapping[str, Any], lr: float, weight_decay: float) -> dict[str, Any]:
        """The fields of a `Change` for the decay."""
        if self.anchored:
            return {"anchor": _anchor(theta, state), "pull": float32(lr * weight_decay)}
        return {"decay": float32(1.0 - lr * weight_decay)}

    def _left(self, lr: float, weight_decay: float) -> float:
        """What the decay of a step leaves of the weights, or of their distance from the start."""
        return 1.0 - float32(lr * weight_decay) if self.anchored else float32(1.0 - lr * weight_decay)

    def _take_back(
        self,
        theta: Tensor,
        state: MutableMapping[str, Any],
        direction: Direction,
        left: float,
        move: Callable[[Tensor, int, int], Tensor] | None = None,
    ) -> None:
        """Reverts a move along a direction, and a decay that has left so much; see `take_back`."""
        away = partial(_away, _anchor(theta, state), 1.0 / left) if self.anchored else None
        take_back(theta, direction, 1.0 if self.anchored else left, move, away)


def _anchor(theta: Tensor, state: MutableMapping[str, Any]) -> Tensor:
    """The weights of the start, flat; at the first call a copy of ``theta``."""
    if ANCHOR not in state:
        flush()
        with torch.inference_mode(False):
            state[ANCHOR] = theta.detach().clone(memory_format=torch.contiguous_format)
    return state[ANCHOR].view(-1)


def _away(anchor: Tensor, factor: float, weights: Tensor, start: int, stop: int) -> None:
    """Takes weights to ``factor`` times their distance from the anchor."""
    weights.add_((weights - anchor[start:stop]).mul_(factor - 1.0))
