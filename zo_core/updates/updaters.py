"""The updater of each slot of an engine, and what checkpoints need of pending updates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..noise import Direction, LowRank, LowRankDirection, Noise
from ..noise.changes import together
from ..probing.materialise import is_compiled
from ..rules import Torch, UpdateRule
from ..targets import Slot
from .base import AtOnce, ByTorchOptimizer, TorchStep, Updater
from .places import Places
from .window import Window
from .windows import Windows

#: A slot, its estimate of the gradient, and the learning rate and weight decay of its group.
Move = tuple[Slot, Direction, float, float]


class Updaters:
    """Writes the slots of an engine, each by an updater of its own.

    With a low-rank noise, updates of matrices are pending in windows if the rule supports it (`UpdateRule.linear`).
    One that decays to the weights of the start writes at once, too. Compiled models have no windows, because no hook
    or function mode could correct their forwards. Pending updates of an earlier engine are merged into the weights.

    Args:
        model: the module that is trained.
        slots: the slots that move.
        places: where the slots are stored.
        noise: the noise of the directions.
        rule: the update rule.
        inner: the torch optimizer that does the updates; None if the rule does.
        stochastic: whether updates of 16-bit weights round stochastically.
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
        if rule.anchored and (relative := [slot.key for slot in slots if slot.scaling and slot.scaling.relative]):
            raise ConfigError(
                [
                    f"decay_to='start' is not for quantisation scales that move by a fraction of themselves, such as "
                    f"{relative[0]}; leave it out, or write relative=False in the target"
                ]
            )
        if isinstance(noise, LowRank) and rule.linear and not rule.anchored and not compiled:
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
        """Applies the updates of one step."""
        with torch.no_grad(), self.windows.hidden(), together():
            for slot, direction, lr, weight_decay in moves:
                if not direction.still:
                    self.of[slot].update(rule, direction, lr, weight_decay)
            if self.step is not None:
                assert isinstance(rule, Torch)
                self.step.run(rule)
        torch.clear_autocast_cache()

    def follow(self, rule: UpdateRule) -> None:
        """Switches to another rule; its state of streamed slots is streamed with them."""
        self.places.keep([slot for slot, updater in self.of.items() if not updater.windowed], rule)

    def waiting(self, slot: Slot) -> LowRankDirection | None:
        """The pending updates of a slot, to be added to its weights in memory; None if there are none."""
        return self.windows.waiting(slot)

    def settle(self) -> bool:
        """Merges everything that is pending in windows into the weights; returns whether there was anything."""
        return self.windows.settle()

    def wait_no_more(self, rule: UpdateRule) -> None:
        """Merges pending updates; from now on all slots are written at once."""
        self.settle()
        self.of.update({slot: self._other(slot) for slot in self.windows.of})
        self.places.keep(self.windows.of, rule)
        self.windows = Windows(self.windows.model, {}, self.places)

    # Checkpoints

    def saved(self) -> dict[int, dict[str, Any]]:
        """The pending updates, as `Window.saved` returns them, by the ``id`` of the slot's tensor in the optimizer."""
        with self.windows.hidden():
            found = {id(slot.tensor): window.saved() for slot, window in self.windows.of.items()}
        return {key: kept for key, kept in found.items() if kept}

    def fits(self, tensor: Tensor, kept: Mapping[str, Any]) -> bool:
        """Whether a window that was saved for a tensor fits this engine."""
        slot = self.windows.slots.get(id(tensor))
        return slot is not None and self.windows.of[slot].fits(kept)

    def load(self, kept: Mapping[int, Mapping[str, Any]]) -> None:
        """Restores what was `saved`, and the rule's state that the optimizer has loaded."""
        with torch.no_grad(), self.windows.hidden():
            self.load_windows(kept)
            self.places.store()

    def load_windows(self, kept: Mapping[int, Mapping[str, Any]]) -> None:
        """Restores the pending updates that were `saved`, and of the weights those that are in ``kept``."""
        for slot, window in self.windows.of.items():
            window.load(kept.get(id(slot.tensor), {}))


def can_wait(noise: Noise, slot: Slot) -> bool:
    """Whether the updates of a slot can be pending: it is a matrix, of which all its tensors have the same view."""
    return noise.rank_of(slot.tensor.shape, slot.scaling) is not None and slot.region is None


def changes_often(noise: Noise, slot: Slot) -> bool:
    """Whether a slot is written at every step while others are written once per window."""
    return isinstance(noise.plain, LowRank) and not can_wait(noise, slot)
