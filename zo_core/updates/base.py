"""How a slot is written: at once, or by the torch optimizer that was passed. A third way is `Window`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..noise import Direction
from ..rules import RuleMove, Torch, UpdateRule
from ..targets import Slot
from .places import Places, State


class Updater:
    """Writes one slot. The rule is passed to each update, because a scheduler may have changed it.

    Class attributes:
        windowed: whether updates are pending until the end of a window.
    """

    windowed: ClassVar[bool] = False

    def update(self, rule: UpdateRule, direction: Direction, lr: float, weight_decay: float) -> None:
        """Moves the slot.

        Args:
            rule: the update rule.
            direction: the estimate ``G`` of the gradient; it is not `Direction.still`.
            lr: learning rate of the slot's group.
            weight_decay: decoupled weight decay of the slot's group.
        """
        raise NotImplementedError

    def undo(self, moves: Callable[[], Sequence[RuleMove]]) -> None:
        """Reverts updates of this slot, the last one first; see `UpdateRule.undo`.

        Args:
            moves: returns the updates, oldest first; called when the weights are at hand. Nothing may be pending.
        """
        raise NotImplementedError

    def effective(self, direction: Direction) -> Direction:
        """A direction from the weights in memory, which includes pending updates."""
        return direction

    def settle(self) -> bool:
        """Merges pending updates into the weights; returns whether there were any."""
        return False


class AtOnce(Updater):
    """The rule writes into the weights, wherever they are stored.

    Args:
        slot: the slot to write.
        places: where it is stored.
    """

    def __init__(self, slot: Slot, places: Places):
        self.slot, self.places = slot, places

    def update(self, rule: UpdateRule, direction: Direction, lr: float, weight_decay: float) -> None:
        self.places.move(self.slot, partial(_by_rule, rule, direction, lr, weight_decay))

    def undo(self, moves: Callable[[], Sequence[RuleMove]]) -> None:
        self.places.move(self.slot, partial(_undo, moves))


def _by_rule(
    rule: UpdateRule, direction: Direction, lr: float, weight_decay: float, theta: Tensor, state: State
) -> None:
    rule.update(theta, state, direction, lr, weight_decay)


def _undo(moves: Callable[[], Sequence[RuleMove]], theta: Tensor, state: State) -> None:
    for part in backwards(moves()):
        part[-1][0].undo(theta, state, part)


def backwards(moves: Sequence[RuleMove]) -> list[list[RuleMove]]:
    """Runs of moves by rules of one class, the last one first; within each, the oldest move is the first."""
    return [list(part) for _, part in groupby(moves, key=lambda move: type(move[0]))][::-1]


class TorchStep:
    """One step of a torch optimizer over all slots that have moved."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self.moves: list[tuple[Tensor, Direction]] = []

    def run(self, rule: Torch) -> None:
        moves, self.moves = self.moves, []
        rule.step(self.optimizer, moves)


class ByTorchOptimizer(Updater):
    """The estimate becomes the slot's gradient in the optimizer's next step, with its own hyperparameters.

    Args:
        slot: the slot to write.
        step: the next step of the optimizer.
    """

    def __init__(self, slot: Slot, step: TorchStep):
        self.slot, self.step = slot, step

    def update(self, rule: UpdateRule, direction: Direction, lr: float, weight_decay: float) -> None:
        self.step.moves.append((self.slot.tensor, direction))


def copies(held: dict[str, Any]) -> dict[str, Any]:
    """A copy of a state, with its tensors cloned."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in held.items()}
