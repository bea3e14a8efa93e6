"""What each probe of a sweep has for itself: random generators, module modes, and what its forwards change."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from ..forward_state import ForwardState
from ..modes import GENERATORS, modes, moved_generators, rng_state, set_modes, set_rng_state

#: Generators whose state is looked at whenever a probe gives up the turn; that of the others takes too long.
CHEAP = frozenset({"torch"})


class OwnState:
    """Exchanges the state of the process when probes take turns, so that each has its own, from the same start.

    The first sweep of several probes exchanges all of it at every turn, and records what has moved. Later sweeps
    exchange only that. They look at the modes and at torch's generator at every turn, too, and at the other generators
    at their end. If one of these has moved for the first time, the probes have seen each other's numbers, and the
    caller has to repeat the sweep.

    Args:
        model: the module that the closures call.
        forwards: what forwards change in it.

    Attributes:
        moving: the generators, and ``"modes"``, that have moved within a sweep.
        seen: whether the probes of the sweep may have seen each other's state.
        looking: whether everything is exchanged.
    """

    def __init__(self, model: nn.Module, forwards: ForwardState):
        self.model, self.forwards = model, forwards
        self.moving: set[str] = set()
        self.seen = False
        self.looking = True
        self._modules: list[nn.Module] = []
        self._start: dict[str, Any] = {}
        self._flags: list[bool] = []
        self._of: list[tuple[dict[str, Any], list[bool], Any]] = []

    @property
    def drew(self) -> bool:
        """Whether a sweep so far has used random numbers."""
        return not self.moving.isdisjoint(GENERATORS)

    def begin(self, count: int) -> None:
        """Records the state that each of ``count`` probes starts from, once the modes of the probes are set."""
        self._modules = list(self.model.modules())
        self._start, self._flags = rng_state(), modes(self._modules)
        self._of = [({}, self._flags, self.forwards.get())] * count

    def leave(self, index: int) -> None:
        """Called when a probe gives up the turn."""
        self._look(GENERATORS if self.looking else CHEAP)
        flags = modes(self._modules)
        if flags == self._flags:
            flags = self._flags
        else:
            self.moving.add("modes")
        if self.looking:
            self.seen |= self.forwards.share()
        self._of[index] = rng_state(self.moving & GENERATORS.keys()), flags, self.forwards.get()

    def enter(self, index: int) -> None:
        """Called when a probe gets the turn."""
        generators, flags, forwards = self._of[index]
        if self.moving:
            set_rng_state({kind: self._start[kind] for kind in self.moving & GENERATORS.keys()} | generators)
            set_modes(self._modules, flags)
        self.forwards.put(forwards)

    def end(self) -> None:
        """Leaves the state of the last probe; the modes of the probes are still set."""
        if self._of:
            if not self.looking:
                self.seen |= self._look(GENERATORS)
            self.enter(-1)
        self._modules, self._of = [], []

    def _look(self, kinds: Collection[str]) -> bool:
        """Records which generators differ from the start; returns whether that is new for one of them."""
        found = moved_generators(rng_state(kind for kind in kinds if kind not in self.moving), self._start)
        self.moving |= found
        return bool(found)
