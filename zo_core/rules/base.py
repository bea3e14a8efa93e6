"""What an update rule is: it applies the probes of a step to one slot, locally."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..noise import Direction
from ..registry import Registry


@dataclass(frozen=True)
class UpdateRule:
    """How the estimate ``G = sum_i coefficient_i * z_i`` changes a slot.

    Class attributes:
        name: its name in the registry.
        wants_optimizer: whether a torch optimizer does the update.
        elementwise: whether each element moves by its own value, state and noise alone, so that a slot
            may be moved piece by piece; ``state`` then holds tensors of the slot's shape only.
        linear: whether ``theta`` and ``state`` change linearly with the estimate, and by elements of it alone, so
            that the factor of a sum of low rank can be moved in the place of the sum. Updates of other rules are
            never of low rank, and are written at once.
    """

    name: ClassVar[str]
    wants_optimizer: ClassVar[bool] = False
    elementwise: ClassVar[bool] = False
    linear: ClassVar[bool] = False

    def state(self, theta: Tensor) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and dtype of each tensor that this rule keeps for a slot between steps; zeros at first."""
        return {}

    def update(
        self, theta: Tensor, state: MutableMapping[str, Any], direction: Direction, lr: float, weight_decay: float
    ) -> None:
        """Changes ``theta`` and ``state`` in place.

        Args:
            theta: the slot's weights.
            state: what `state` names, saved in checkpoints; made here where it is missing.
            direction: ``G``.
            lr: learning rate of the slot's group.
            weight_decay: decoupled: the weights shrink by ``1 - lr * weight_decay`` first.
        """
        raise NotImplementedError


RULES: Registry[UpdateRule] = Registry("rule", UpdateRule)
