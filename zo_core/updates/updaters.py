"""Which updater each slot of an engine has, and what checkpoints need of those that wait."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..noise import Direction, LowRank, LowRankDirection, Noise
from ..oracle.materialise import is_compiled
from ..rules import Torch, UpdateRule
from ..targets import Slot
from .base import AtOnce, ByTorchOptimizer, TorchStep, Updater, copies
from .places import Places
from .window import Window
from .windows import Windows

#: A slot, its estimate of the gradient, and the learning rate and weight decay of its group.
Move = tuple[Slot, Direction, float, float]


class Updaters:
    """Writes the slots of an engine, each by an updater of its own.

    Matrices of a low-rank noise wait in windows where the rule has a form for them (`UpdateRule.linear`). Compiled
    models have none, whose forwards no hook or function mode could correct. What waits for an engine before this
    one goes into the weights.

    Args:
        model: the module that is trained.
        slots: what moves.
        places: where the slots are.
        noise: of the directions.
        rule: decides the updates.
        inner: the torch optimizer that does them; None if the rule does.
        stochastic: how 16-bit weights are rounded.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: Sequence[Slot],
        places: Places,
        noise: Noise,
        rule: UpdateRule,
        inner: torch.optim.Optimizer | None,
        *,
        stochastic: bool,
    ):
        for before in Windows.in_model(model):
            before.settle()
        self.places = places
        self.step = None if inner is None else TorchStep(inner)
        noise, compiled = noise.plain, any(map(is_compiled, model.modules()))
        windows: dict[Slot, Window] = {}
        if isinstance(noise, LowRank) and rule.linear and not compiled:
            windows = {
                slot: Window(slot, noise, places, stochastic=stochastic) for slot in slots if can_wait(noise, slot)
            }
        others: dict[Slot, Updater] = {slot: self._other(slot) for slot in slots if slot not in windows}
        self.of: dict[Slot, Updater] = {**others, **windows}
        places.keep(others, rule)
        self.windows = Windows(model, windows, places)

    def _other(self, slot: Slot) -> Updater:
        return AtOnce(slot, self.places) if self.step is None else ByTorchOptimizer(slot, self.step)

    def apply(self, rule: UpdateRule, moves: Iterable[Move]) -> None:
        """The updates of one step."""
        with torch.no_grad(), self.windows.hidden():
            for slot, direction, lr, weight_decay in moves:
                if not direction.still:
                    self.of[slot].update(rule, direction, lr, weight_decay)
            if self.step is not None:
                assert isinstance(rule, Torch)
                self.step.run(rule)
        torch.clear_autocast_cache()

    def follow(self, rule: UpdateRule) -> None:
        """Another rule decides from here on; what it keeps of streamed slots has to travel with them."""
        self.places.keep([slot for slot, updater in self.of.items() if not updater.windowed], rule)

    def waiting(self, slot: Slot) -> LowRankDirection | None:
        """What has to be added to the weights of a slot in memory; None for nothing."""
        return self.windows.waiting(slot)

    def settle(self) -> None:
        """Puts everything that waits for the end of a window into the weights."""
        self.windows.settle()

    def wait_no_more(self, rule: UpdateRule) -> None:
        """All slots are written at once from here on."""
        self.settle()
        self.of.update({slot: self._other(slot) for slot in self.windows.of})
        self.places.keep(self.windows.of, rule)
        self.windows = Windows(self.windows.model, {}, self.places)

    # Checkpoints

    def saved(self) -> dict[Slot, dict[str, Any]]:
        """What waits, by slot, as `Window.saved` returns it."""
        with self.windows.hidden():
            found = {slot: window.saved() for slot, window in self.windows.of.items()}
        return {slot: kept for slot, kept in found.items() if kept}

    def fits(self, tensor: Tensor, kept: Mapping[str, Any]) -> bool:
        """Whether a window that was saved for a tensor is one of this engine's."""
        slot = self.windows.slots.get(id(tensor))
        return slot is not None and self.windows.of[slot].fits(kept)

    def load(self, kept: Mapping[Slot, Mapping[str, Any]]) -> None:
        """Goes on with what was `saved`; nothing waits for other slots."""
        with torch.no_grad(), self.windows.hidden():
            for slot, window in self.windows.of.items():
                window.load(kept.get(slot, {}))

    def copied(self) -> dict[Slot, dict[str, Any]]:
        """As `saved`, in memory of its own."""
        return {slot: copies(window.saved()) for slot, window in self.windows.of.items()}


def can_wait(noise: Noise, slot: Slot) -> bool:
    """Whether the updates of a slot can wait: of a matrix, which all of its tensors show alike."""
    return noise.rank_of(slot.tensor.shape, slot.scaling) is not None and slot.region is None


def changes_often(noise: Noise, slot: Slot) -> bool:
    """Whether a slot is written at every step while others are once in a window."""
    return isinstance(noise.plain, LowRank) and not can_wait(noise, slot)
