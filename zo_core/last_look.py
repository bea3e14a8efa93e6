"""The last look of a run: are its weights better than those that it began with, on the very batches of its first steps?

The tests of the brake compare losses of different batches, and a rise that is smaller than the noise between these
escapes them. So the batches of the first steps are kept, with the losses that were measured there. In the last step of
a run whose length is known they are measured once more: with the same directions, distances and random numbers, so
that noise and curvature are the same on both sides, and only the weights differ.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import FunctionType
from typing import Any, Protocol

from torch import Tensor

from .ambient import ambient
from .brake import Alarm
from .directions import Directions
from .errors import QueryError
from .free_variables import FreeVariables, bound
from .modes import set_rng_state
from .running import Running
from .second_round import FAILED, Start
from .step import StepPlan, mean
from .targets import Slot

logger = logging.getLogger(__name__)

#: The part of a run's steps that is measured again, and the most and the fewest steps.
PART, MOST, LEAST = 1 / 20, 64, 8
#: Bytes of tensors in the batches that are kept; further steps are not.
KEPT_BYTES = 64 << 20


class Looking(Running, Protocol):
    """An engine that looks back."""

    directions: Directions


@dataclass(frozen=True)
class Worse(Alarm):
    """The loss at the end of a run is above that of its beginning, on the same batches.

    Attributes:
        count: the number of steps that were compared.
    """

    count: int

    def said(self, step: int) -> str:
        return (
            f"step {step}, the last one: on the batches of the first {self.count} steps the loss is {self.loss:.4g}, "
            f"and it was {self.best:.4g} when they were trained on ({self.reason})"
        )


@dataclass(frozen=True)
class Call:
    """Micro-batches that were measured together.

    Attributes:
        closures: they return the losses.
        variables: what they read from around them, one for each.
        scaled: for each of them, how the caller scales its loss; None for not at all.
        random: state of the generators before them.
        run: calls a function as they were called: under autocast, for example.
    """

    closures: Sequence[Callable[[], Any]]
    variables: Sequence[FreeVariables]
    scaled: Sequence[Callable[[Tensor], Tensor]] | None
    random: dict[str, Any]
    run: Callable[[Callable[[], Any]], Any]


class LastLook:
    """What is kept of the first steps of a run for the last one.

    Args:
        steps: length of the run.
        slots: what moves; if that changes during the run, there is no look.

    Attributes:
        worse: what the look has found; None if the run ends better than it began, or if that is not known.
    """

    def __init__(self, steps: int, slots: Sequence[Slot]):
        self.steps, self.slots = steps, slots
        self.count = min(MOST, int(steps * PART))
        if self.count < LEAST:
            self.count = 0
        #: The plans of the first steps, with the calls that measured them.
        self.kept: list[tuple[StepPlan, list[Call]]] = []
        self.room = KEPT_BYTES
        self.done = False
        self.worse: Worse | None = None
        self._calls: list[Call] = []
        self._plan: StepPlan | None = None

    def keep(
        self,
        plan: StepPlan,
        closures: Sequence[Callable[[], Any]],
        scaled: Sequence[Callable[[Tensor], Tensor]] | None,
        random: dict[str, Any],
    ) -> None:
        """Keeps micro-batches of a step that are about to be measured, if it is one of the first."""
        if plan.step < self.count and self.room >= 0 and self._unchanged():
            if plan is not self._plan:  # what was measured for an earlier one has been discarded
                self._plan, self._calls = plan, []
            self.room -= sum(map(held_bytes, closures))
            variables = list(map(FreeVariables, closures))
            self._calls.append(Call(list(closures), variables, scaled, random, ambient()))

    def _unchanged(self) -> bool:
        """Whether all kept closures would measure what they have measured; else they are released, and a line says so.

        In a loop that changes what they read this is known in the second step, and no batches wait for the last one.
        """
        kept = [variables for _, calls in self.kept for call in calls for variables in call.variables]
        names = sorted({name for variables in kept for name in variables.changed()})
        if not names:
            return True
        logger.warning(
            "the last look at the first steps is left out: %s changed after closures that read it were measured; "
            "write zo.step(%s), which keeps what it was measured with",
            " and ".join(names),
            bound(names),
        )
        self.kept, self.room = [], -1
        return False

    def measured(self, plan: StepPlan) -> None:
        """Takes the losses of a step that is about to be applied, on every process."""
        calls, self._calls, self._plan = self._calls, [], None
        if calls and self.room >= 0 and math.isfinite(mean(plan.own)) and not plan.failed:
            self.kept.append((replace(plan, sums=[], thresholds={}, random={}), calls))

    def due(self, step: int) -> bool:
        """Whether a step is the last one."""
        return bool(self.count) and step == self.steps - 1

    def look(self, engine: Looking) -> None:
        """Measures the first steps again, once; random generators and the state of the model stay as they are."""
        if not self.done:
            self.done = True
            self.worse = self._compared(engine)

    def _compared(self, engine: Looking) -> Worse | None:
        """What is wrong; None if the weights are better than those of the beginning, or if nobody knows."""
        unchanged = self._unchanged()
        kept, self.kept = self.kept, []
        ready = unchanged and len(kept) >= LEAST and engine.slots is self.slots
        if not all(engine.exchange.everywhere(ready)):
            return None
        end, current = Start(engine.oracle), engine.directions.plan
        found: list[tuple[float, float]] = []
        try:
            with engine.hidden(), engine.around():
                each = Start(engine.oracle)  # with what the context has set
                for plan, calls in kept[: min(engine.exchange.everywhere(len(kept)))]:
                    losses = self._again(engine, plan, calls)
                    if losses is None:
                        logger.warning("the last look at the first steps is left out: %s", FAILED)
                        return None
                    found.append((mean(plan.own), mean(losses)))
                    each.put()  # what a forward changes in the model is for each of them as it is now
        finally:
            engine.directions.plan = current
            end.put()
        return compared(found)

    def _again(self, engine: Looking, before: StepPlan, calls: Sequence[Call]) -> list[float] | None:
        """The losses of a step at the points of its estimate; None if a query failed in any process."""
        points = before.points[: len(before.points) - before.extra]
        mine = engine.exchange.dealt(points, before.seeds)[engine.exchange.rank]
        ratios = engine.directions.ratios(engine.slots)
        plan = replace(before, points=points, mine=mine, extra=0, ratios=ratios, gathered=[], own=[])
        engine.directions.plan = plan
        try:
            for call in calls:
                set_rng_state(call.random)
                found = call.run(partial(engine.oracle.together, plan.to_measure, call.closures))
                for index, losses in enumerate(found):
                    plan.add(losses if call.scaled is None else list(map(call.scaled[index], losses)))
        except QueryError as error:
            plan.failed = str(error) or FAILED
        losses = plan.gather(engine.exchange)
        engine.noise.forget(plan.seeds, engine.places.waits())
        return None if plan.failed else losses


def compared(found: Sequence[tuple[float, float]]) -> Worse | None:
    """Whether losses have risen.

    Where a run learns within its first steps, the mean of these is already below what it began with. So the loss also
    has to be above that of the first half of them: going back to the beginning would else lose what these have learnt.

    Args:
        found: for each of the first steps its loss then and now.
    """
    begin, end = (math.fsum(pair[side] for pair in found) / len(found) for side in (0, 1))
    first = found[: len(found) // 2]
    if math.isfinite(end) and (end <= begin or math.fsum(now - then for then, now in first) <= 0.0):
        return None
    share = sum(not now <= then for then, now in found)
    return Worse(begin, 0, end, f"higher in {share} of them", len(found))


def held_bytes(closure: Any) -> int:
    """Bytes of the tensors in the arguments of a `partial`, the defaults of a function, or the object of a method."""
    if isinstance(closure, partial):
        return _bytes((closure.args, closure.keywords))
    if isinstance(closure, FunctionType):
        return _bytes(closure.__defaults__ or ())
    return _bytes(vars(closure.__self__)) if inspect.ismethod(closure) else 0


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_bytes, value))
    return 0
