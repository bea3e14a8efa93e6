"""Any torch optimizer as the update rule: it finds the estimate in ``.grad``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ..noise import Direction
from .base import RULES, UpdateRule

#: Optimizers whose step treats every parameter separately, so that one gradient at a time is enough.
SEPARABLE = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop)


@RULES.register
@dataclass(frozen=True)
class Torch(UpdateRule):
    """A torch optimizer does the update; this is the rule when one is passed.

    With SGD, Adam, AdamW and RMSprop one gradient exists at a time. Other optimizers may use all gradients
    together, so they get all at once, which takes the memory of a second set of weights.
    """

    name: ClassVar[str] = "torch"
    wants_optimizer: ClassVar[bool] = True

    def step(self, optimizer: torch.optim.Optimizer, slots: Iterable[tuple[Tensor, Direction]]) -> None:
        """One step of ``optimizer`` with the estimate as the gradient of each slot.

        Args:
            optimizer: holds the slots' tensors in its groups.
            slots: pairs of a slot's tensor and its ``G``.
        """
        pairs = list(slots)
        if type(optimizer) not in SEPARABLE or _has_step_hooks(optimizer):
            for tensor, direction in pairs:
                tensor.grad = _gradient(tensor, direction)
            optimizer.step()
            for tensor, _ in pairs:
                tensor.grad = None
            return
        groups = optimizer.param_groups
        home = {id(tensor): group for group in groups for tensor in group["params"]}
        members = [list(group["params"]) for group in groups]
        try:
            for group in groups:
                group["params"] = []
            for tensor, direction in pairs:
                tensor.grad = _gradient(tensor, direction)
                home[id(tensor)]["params"] = [tensor]
                optimizer.step()
                home[id(tensor)]["params"] = []
                tensor.grad = None
        finally:
            for group, params in zip(groups, members, strict=True):
                group["params"] = params
            for tensor, _ in pairs:
                tensor.grad = None


def _gradient(tensor: Tensor, direction: Direction) -> Tensor:
    return direction.gradient(tensor.detach()).to(tensor.dtype)


def _has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether there are hooks that would run once per parameter instead of once per step, and do not allow it."""
    own = [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]
    strict = any(not getattr(hook, "per_parameter", False) for hook in own)
    return bool(strict or _global_optimizer_pre_hooks or _global_optimizer_post_hooks)
