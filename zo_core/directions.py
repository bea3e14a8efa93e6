"""Turns points and probes into the move of each slot: its direction, the unit of its eps, its hyperparameters."""

from __future__ import annotations

import math
import operator
from collections import ChainMap
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

from .noise import Alternatives, Direction, Noise, Passes, Terms
from .noise.direction import Scaling
from .noise.parts import Part
from .optimizer import TorchOptimizerFace, ZOOptimizer, number
from .records import Point, Probe
from .step import StepPlan, times
from .targets import Slot, as_it_lies
from .updates import Move, Updater


class Directions:
    """The directions of an engine's slots.

    Args:
        noise: the noise of the run.
        backend: the backend of the passes over the weights.
        optimizer: its groups hold the slots' hyperparameters, and it keeps the thresholds of masks.
        eps: returns the eps of the step, which is that of the first group.
        decaying: returns what the weight decays of the groups are multiplied by in the step.
        stochastic: whether updates of 16-bit weights round stochastically.

    Attributes:
        plan: the step in progress; None between steps.
    """

    def __init__(
        self,
        noise: Noise,
        backend: str,
        optimizer: ZOOptimizer,
        eps: Callable[[], float],
        decaying: Callable[[], float],
        *,
        stochastic: bool,
    ):
        self.noise, self.backend, self.optimizer, self.eps, self.stochastic = noise, backend, optimizer, eps, stochastic
        self.decaying = decaying
        self.plan: StepPlan | None = None
        #: What the slots of a step have in common, for the thresholds that they share.
        self._passes: dict[tuple[int | None, Scaling | None, Part | None], Passes] = {}
        self._thresholds: MutableMapping[str, float] | None = None
        self._of: StepPlan | None = None

    def relative_eps(self, group: dict[str, Any]) -> float:
        """The eps of a group in units of the step's eps."""
        if isinstance(self.optimizer, TorchOptimizerFace):
            return 1.0  # what a torch optimizer calls eps is something else
        return float(group["eps"]) / self.eps()

    def ratios(self, slots: list[Slot]) -> dict[Slot, float]:
        """By slot, the eps of its group in units of the step's eps."""
        groups = self.optimizer.groups_of(slots)
        ratios = {id(group): self.relative_eps(group) for group in self.optimizer.param_groups}
        return {slot: ratios[id(groups[slot])] for slot in slots}

    def multipliers(self, slots: list[Slot]) -> list[float]:
        """What multiplies the coefficients of a step: learning rates, weight decays, and ratios of eps."""
        return [*self.rates(), *map(_decay, self.optimizer.param_groups), *set(self.ratios(slots).values())]

    def rates(self) -> list[float]:
        """The learning rate of each group, as it is applied in a step."""
        return [number(group, "lr", 0.0) * self.optimizer.factor for group in self.optimizer.param_groups]

    def decays(self) -> list[float]:
        """The weight decay of each group, as it is applied in a step."""
        factor = self.decaying()
        return [_decay(group) * factor for group in self.optimizer.param_groups]

    def taken_by_decay(self, directions: int) -> float:
        """The largest share of its weights that weight decay takes from a slot in a step with so many directions."""
        if isinstance(self.optimizer, TorchOptimizerFace):
            return 0.0  # its own affair
        return max(map(operator.mul, self.rates(), self.decays())) / self.noise.share_in(directions)

    def unit(self, slot: Slot, seed: int) -> Direction:
        """The direction ``z(seed)`` of a slot, in the units of the step's eps."""
        return self._along(slot, ((seed, self.ratios([slot])[slot]),), None, dict(self.optimizer.thresholds))

    def probe(self, updater: Updater, slot: Slot, point: Point) -> Direction:
        """What is added to a slot's weights in memory to measure at a point."""
        plan = self.plan
        if plan is None or plan is not self._of or plan.probes:
            return self._at(updater, slot, [point])
        terms = ((point.seed, point.scale * plan.ratios[slot]),)  # as `_at`, for each tensor of each probe
        assert self._thresholds is not None
        return updater.effective(self._along(slot, terms, None, self._thresholds))

    def alternatives(self, updater: Updater, slot: Slot, points: Sequence[Point]) -> Alternatives:
        """As `probe`, for each of several points."""
        return Alternatives.of(self._at(updater, slot, points))

    def _at(self, updater: Updater, slot: Slot, points: Sequence[Point]) -> Direction:
        plan, rounding = self.plan, None
        ratio = self.ratios([slot])[slot] if plan is None else plan.ratios[slot]
        if plan is None or not plan.probes:
            terms = tuple([(point.seed, point.scale * ratio) for point in points])
        else:  # computed and rounded as the update will be
            steps = [times(probe, point.scale) for point in points for probe in plan.probes]
            terms = tuple([(step.seed, step.coefficient / ratio * -plan.rates[slot]) for step in steps])
            rounding = plan.probes[0].seed if self.stochastic else None
        # Masks that are needed for the first time become part of the run with the update, not before.
        if plan is None or plan is not self._of:
            self._of, own = plan, {} if plan is None else plan.thresholds
            self._alike(ChainMap(own, self.optimizer.thresholds))
        assert self._thresholds is not None
        return updater.effective(self._along(slot, terms, rounding, self._thresholds))

    def _alike(self, thresholds: MutableMapping[str, float]) -> None:
        self._passes, self._thresholds = {}, thresholds

    @as_it_lies
    def moves(self, slots: list[Slot], probes: tuple[Probe, ...]) -> list[Move]:
        """The moves of the slots in a step with these probes, with the current hyperparameters of their groups."""
        groups = self.optimizer.groups_of(slots)
        factor = self.optimizer.factor
        how: dict[int, tuple[Terms, float, float]] = {}
        for group, decay in zip(self.optimizer.param_groups, self.decays(), strict=True):
            decay = decay / self.noise.share_in(len(probes))
            how[id(group)] = _shared(probes, self.relative_eps(group)), number(group, "lr", math.nan) * factor, decay
        rounding, thresholds = probes[0].seed if self.stochastic else None, self.optimizer.thresholds
        found: list[Move] = []
        for slot, group in groups.items():
            terms, lr, decay = how[id(group)]
            found.append((slot, self._along(slot, terms, rounding, thresholds), lr, decay))
        return found

    def move(self, slot: Slot, probes: tuple[Probe, ...], ratio: float, lr: float, weight_decay: float) -> Move:
        """The move of a slot in a step with these probes.

        Args:
            slot: one of the engine's.
            probes: the probes of the step.
            ratio: `relative_eps` of the slot's group. With ``m z`` perturbed, the difference of the losses
                measures ``m z . grad``, so the estimate of this group's gradient is divided by m.
            lr: learning rate of the group.
            weight_decay: weight decay of the group, as it is applied.
        """
        terms = _shared(probes, ratio)
        direction = self._along(slot, terms, probes[0].seed if self.stochastic else None, self.optimizer.thresholds)
        return slot, direction, lr, weight_decay / self.noise.share_in(len(probes))

    def _along(
        self,
        slot: Slot,
        terms: Terms,
        rounding: int | None,
        thresholds: MutableMapping[str, float],
    ) -> Direction:
        if thresholds is not self._thresholds:
            self._alike(thresholds)
            self._of = None
        alike = rounding, slot.scaling, slot.part
        passes = self._passes.get(alike)
        if passes is None:
            passes = Passes(rounding, self.backend, slot.scaling, thresholds, slot.part)
            self._passes[alike] = passes
        return self.noise.direction(slot.key, slot.shape, terms, passes)


def _shared(probes: Sequence[Probe], ratio: float) -> Terms:
    """The terms of an update for all slots of a group with this `Directions.relative_eps`."""
    return tuple([(probe.seed, probe.coefficient / ratio) for probe in probes])


def _decay(group: dict[str, Any]) -> float:
    return number(group, "weight_decay", 0.0)
