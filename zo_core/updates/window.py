"""Pending low-rank updates: inside a window the weights in memory are not written.

    W_eff = decay * W + A right          A [m, K] float32, right [K, columns] the bases of the window

A step applies the rule to the small factor A instead of W, with the left factors as its direction. When the
window ends, the sum is added to W at once, so 16-bit weights round stochastically once per window. The rule's
state (momentum) has the shape of A, and is projected to the next window's bases (LOZO-M, arXiv 2410.07698,
section 4.2).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..noise import Direction, FactorDirection, LowRank, LowRankDirection
from ..noise.direction import float32, float64
from ..noise.low_rank import SIGNS, basis
from ..noise.reverting import take_back
from ..rules import RuleMove, UpdateRule
from ..targets import Slot
from .base import Updater, backwards, copies
from .places import Places, State

#: Prefix of the names of the rule's state in a checkpoint, next to the factor.
PREFIX = "factor_"


class Window(Updater):
    """The window of one matrix.

    Args:
        slot: the matrix.
        noise: the low-rank noise.
        places: where the matrix is stored.
        stochastic: whether the sums of 16-bit weights round stochastically.

    Attributes:
        factor: A, float32 ``[m, K]``; None before the first update.
        bases: the bases of the window.
        decay: factor by which the weights have shrunk in this window.
        moved: whether W_eff may differ from the weights in memory.
        written: whether pending updates were ever merged into the weights.
        state: the rule's state for A.
        exported: weak reference to the copy of W_eff in a state dict, while that is in use.
    """

    windowed: ClassVar[bool] = True

    def __init__(self, slot: Slot, noise: LowRank, places: Places, *, stochastic: bool):
        self.slot, self.noise, self.places, self.stochastic = slot, noise, places, stochastic
        self.shape = slot.tensor.shape
        self.written = False
        self.forget()

    def forget(self) -> None:
        """Drops pending updates, and with their bases the rule's state."""
        self.factor: Tensor | None = None
        self.bases: tuple[int, ...] = ()
        self.decay = 1.0
        self.moved = False
        self.state: dict[str, Any] = {}
        self.exported: weakref.ref[Tensor] | None = None

    def update(self, rule: UpdateRule, direction: Direction, lr: float, weight_decay: float) -> None:
        bases = tuple(basis(seed) for seed, _ in direction.terms)
        factor = self.factor
        if factor is None or self.bases != bases:
            factor = self._turn(bases, direction.rounding_seed)
        self.exported = None
        self.decay *= float32(1.0 - lr * weight_decay)
        self.moved = self.moved or self.decay != 1.0 or any(c for _, c in direction.terms)
        left = FactorDirection(SIGNS, self.slot.key, direction.terms, factors_of=self.noise, shape=self.shape)
        rule.update(factor, self.state, left, lr, weight_decay)

    def undo(self, moves: Callable[[], Sequence[RuleMove]]) -> None:
        def work(theta: Tensor, state: State) -> None:
            for part in backwards(moves()):
                again = Repeated(self.slot, self.noise, self.places, stochastic=self.stochastic)
                for sum_ in reversed(again.sums(part)):
                    take_back(theta, sum_, float32(sum_.decay))

        self.places.move(self.slot, work)

    def _turn(self, bases: tuple[int, ...], rounding: int | None) -> Tensor:
        """Starts the next window: merges the sum into the weights, and projects the rule's state to the new bases."""
        waiting = self.waiting()
        device = self.places.device(self.slot)
        if waiting is not None:
            self._write(replace(waiting, rounding_seed=rounding))
        with torch.inference_mode(False):
            if self.state and waiting is not None and waiting.base is not None:
                old, new = waiting.base[1], self._right(bases, device)
                self.state = {kind: projected(value, old, new, self.noise.rank) for kind, value in self.state.items()}
            shape = (self.shape[0], len(bases) * self.noise.rank)
            self.factor = torch.zeros(shape, dtype=torch.float32, device=device)
        self.bases, self.decay = bases, 1.0
        return self.factor

    def effective(self, direction: Direction) -> Direction:
        waiting = self.waiting() if isinstance(direction, LowRankDirection) else None
        return direction if waiting is None else replace(waiting, terms=direction.terms)

    def waiting(self) -> LowRankDirection | None:
        """The pending updates, to be added to the weights in memory; None if there are none."""
        if self.factor is None:
            return None
        return LowRankDirection(
            *(SIGNS, self.slot.key, (), self.bases[0] if self.stochastic else None),
            factors_of=self.noise,
            shape=self.shape,
            base=(self.factor, self._right(self.bases, self.factor.device)),
            bases=self.bases,
            decay=self.decay,
        )

    def _right(self, bases: tuple[int, ...], device: torch.device) -> Tensor:
        return self.noise.rights(bases, self.slot.key, self.shape, device)

    def _write(self, waiting: LowRankDirection) -> None:
        def work(theta: Tensor, state: State) -> None:
            waiting.add_to(theta)

        self.written = True
        self.places.move(self.slot, work)

    def settle(self) -> bool:
        """Merges pending updates into the weights. The next update begins a window, without the rule's state.

        Returns:
            Whether there were any.
        """
        waiting = self.waiting()
        if waiting is not None:
            self._write(waiting)
        self.forget()
        return waiting is not None

    # Checkpoints

    def saved(self) -> dict[str, Any]:
        """What a checkpoint needs; empty if nothing is pending. The weights are those in memory, not W_eff."""
        if self.factor is None:
            return {}
        state = {PREFIX + kind: value for kind, value in self.state.items()}
        weights = self.places.values(self.slot)
        return {"factor": self.factor, "bases": self.bases, "decay": self.decay, **state, "weights": weights}

    def fits(self, kept: Mapping[str, Any]) -> bool:
        """Whether what another run has saved has the shapes of this noise and slot."""
        shape = (self.shape[0], len(kept["bases"]) * self.noise.rank)
        return all(value.shape == shape for name, value in kept.items() if name.startswith("factor"))

    def load(self, kept: Mapping[str, Any]) -> None:
        """Restores what `saved` has returned, the weights if they are in it; nothing is pending if it is empty."""
        self.forget()
        if not kept:
            return
        device = self.places.device(self.slot)
        if "weights" in kept:
            self.places.load(self.slot, kept["weights"])
        factors = {name: value for name, value in kept.items() if name.startswith("factor")}
        with torch.inference_mode(False):
            factors = copies({name: value.detach().to(device) for name, value in factors.items()})
        self.factor, self.bases, self.decay = factors.pop("factor"), tuple(kept["bases"]), kept["decay"]
        self.state = {name.removeprefix(PREFIX): value for name, value in factors.items()}
        self.moved = True


class Repeated(Window):
    """Repeats the updates of a window in the factor alone, and keeps the sums instead of adding them to the weights."""

    def sums(self, moves: Sequence[RuleMove]) -> list[LowRankDirection]:
        """What the moves have added to the weights, window by window; momentum from before them is not included."""
        self.done: list[LowRankDirection] = []
        for rule, direction, lr, weight_decay in moves:
            self.update(rule, direction, lr, weight_decay)
        self.settle()
        return self.done

    def _write(self, waiting: LowRankDirection) -> None:
        self.done.append(waiting)


def projected(momentum: Tensor, old: Tensor, new: Tensor, rank: int) -> Tensor:
    """The momentum ``M old`` in the next window's bases: ``M old new^T / columns``, direction by direction.

    Args:
        momentum: M, float32 ``[m, K]``.
        old: signs ``[K, columns]``.
        new: signs ``[K, columns]``; a direction's rank rows are nearly orthogonal, of length sqrt(columns).
        rank: r.

    Returns:
        float32 ``[m, K]``. The products of signs are whole numbers, so this is exact except for the sums over r.
    """
    result = torch.empty_like(momentum)
    columns = old.shape[1]
    for at in range(0, len(old), rank):
        piece = slice(at, at + rank)
        overlap = (float64(old[piece]) @ float64(new[piece]).t() / columns).float().to(momentum.device)
        total = momentum[:, at : at + 1] * overlap[0]
        for k in range(1, rank):
            total = total + momentum[:, at + k : at + k + 1] * overlap[k]
        result[:, piece] = total
    return result
