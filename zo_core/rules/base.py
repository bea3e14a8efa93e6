"""The interface of update rules: each applies the probes of a step to one slot, locally."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..noise import Direction
from ..registry import Registry

#: Name of a state that begins as a copy of the weights, just before their first update, and not as zeros.
ANCHOR = "anchor"


@dataclass(frozen=True)
class UpdateRule:
    """How the estimate ``G = sum_i coefficient_i * z_i`` changes a slot.

    Class attributes:
        name: its name in the registry.
        wants_optimizer: whether a torch optimizer does the update.
        elementwise: whether each element depends only on its own value, state and noise, so that a slot
            may be moved piece by piece; ``state`` then holds only tensors of the slot's shape.
        linear: whether ``theta`` and ``state`` change linearly and elementwise with the estimate, so that the
            factor of a low-rank sum can be moved instead of the sum. Updates of other rules are not of low rank,
            and are written at once.
        scale_free: whether the scale of the estimate has no effect.
        undoable: whether `undo` can revert its updates.
    """

    name: ClassVar[str]
    wants_optimizer: ClassVar[bool] = False
    elementwise: ClassVar[bool] = False
    linear: ClassVar[bool] = False
    scale_free: ClassVar[bool] = False
    undoable: ClassVar[bool] = False

    @property
    def anchored(self) -> bool:
        """Whether weight decay pulls the weights to where they were before their first update."""
        return False

    @property
    def reach(self) -> float | None:
        """How far an estimate moves the weights in the end, in units of ``lr`` times itself; None if it varies."""
        return None

    def state(self, theta: Tensor) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and dtype by name of each tensor that this rule keeps for a slot between steps; initially zeros.

        One named `ANCHOR` has the shape and dtype of ``theta``, and is initially a copy of it.
        """
        return {}

    def update(
        self, theta: Tensor, state: MutableMapping[str, Any], direction: Direction, lr: float, weight_decay: float
    ) -> None:
        """Changes ``theta`` and ``state`` in place.

        Args:
            theta: the slot's weights, in their shape and floating point dtype. In a low-rank window, the float32
                factor ``[m, K]`` instead, for `linear` rules.
            state: tensors by name, with the shapes and dtypes that `state` returns for ``theta``, on its device;
                saved in checkpoints. Missing ones are created here, as zeros.
            direction: ``G``, for a tensor of the shape of ``theta``.
            lr: learning rate of the slot's group.
            weight_decay: decoupled: the weights are first multiplied by ``1 - lr * weight_decay``.

        Raises:
            NotImplementedError: a torch optimizer does the update (`wants_optimizer`).
        """
        raise NotImplementedError

    def undo(self, theta: Tensor, state: MutableMapping[str, Any], moves: Sequence[RuleMove]) -> None:
        """Reverts updates in place, the last one first, without a copy of the weights: exact up to rounding.

        Args:
            theta: the slot's weights after these updates.
            state: as for `update`.
            moves: the updates, oldest first. Their rules are of this class; fields of these may differ.

        Raises:
            NotImplementedError: the rule is not `undoable`.
        """
        raise NotImplementedError


#: The rule of an update, its ``G``, and the learning rate and weight decay of its group.
RuleMove = tuple[UpdateRule, Direction, float, float]

RULES: Registry[UpdateRule] = Registry("rule", UpdateRule)
