"""The second round of a step: losses at multiples of the step that the first round suggests.

The learning rate of a step and the scale of its losses are known when it is applied, and the closures of its
micro-batches are gone by then. So closures are kept until then, with what they started from, and with what their free
variables held.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from .ambient import ambient
from .directions import Directions
from .errors import LossError, QueryError
from .exchange import Exchange
from .forward_state import ForwardState
from .free_variables import FreeVariables, bound
from .modes import modes, rng_state, set_modes, set_rng_state
from .optimizer import number
from .probing import ResidentOracle
from .records import Point
from .running import Running
from .step import StepPlan, probes_from
from .streaming import LockstepOracle

#: Why a step is skipped, if nobody says more.
FAILED = "a query failed"

Oracle = ResidentOracle | LockstepOracle
Scaled = Callable[[Tensor], Tensor]


class Trying(Running, Protocol):
    """An engine whose steps may have a second round."""

    directions: Directions
    exchange: Exchange
    clip: float


class Start:
    """Everything that decides what forwards see besides the weights: generators, modes, and the state of the model.

    Args:
        oracle: runs the model.
        before: an earlier start; its copies are shared if nothing has changed since.
    """

    def __init__(self, oracle: Oracle, before: Start | None = None):
        self.modules = list(oracle.model.modules())
        self.random, self.modes = rng_state(), modes(self.modules)
        self.state: ForwardState
        if before is None or before.state.moved:
            self.state = ForwardState(oracle.model, oracle.state.moving, oracle.state.carried)
            self.state.begin(oracle.state.copied)
        else:
            self.state = before.state

    def put(self) -> None:
        """Restores it."""
        set_rng_state(self.random)
        set_modes(self.modules, self.modes)
        self.state.rewind()


@dataclass
class MicroBatch:
    """What measuring a micro-batch once more takes.

    Attributes:
        closure: returns its loss.
        scaled: scales the loss as that of the first round was scaled before it was added.
        start: what its first probe started from.
        run: calls a function as it was called in the first round: under autocast, for example.
        variables: what the closure read from around it when it had been measured.
    """

    closure: Callable[[], Any]
    scaled: Scaled
    start: Start
    run: Callable[[Callable[[], Any]], Any]
    variables: FreeVariables


class SecondRound:
    """Measures the second round of each step of an engine.

    Attributes:
        kept: the micro-batches of the step in progress.
    """

    def __init__(self) -> None:
        self.kept: list[MicroBatch] = []

    def forget(self) -> None:
        """Releases the closures."""
        self.kept = []

    def first(
        self,
        oracle: Oracle,
        closures: Sequence[Callable[[], Any]],
        scaled: Sequence[Scaled] | None,
        measure: Callable[[Sequence[Callable[[], Any]]], list[list[Tensor]]],
    ) -> list[list[Tensor]]:
        """Measures micro-batches in the first round, and keeps them.

        Args:
            oracle: runs the model.
            closures: one per micro-batch.
            scaled: for each of them, how its loss is scaled; None for not at all.
            measure: measures some closures.
        """
        pairs = list(zip(closures, [_unscaled] * len(closures) if scaled is None else scaled, strict=True))
        # What each starts from is only known if they are measured one by one, or if they change nothing.
        parts = [pairs] if _changes_nothing(oracle) else [[pair] for pair in pairs]
        found: list[list[Tensor]] = []
        for part in parts:
            start, run = Start(oracle, self.kept[-1].start if self.kept else None), ambient()
            found += measure([closure for closure, _ in part])
            self.kept += [MicroBatch(closure, scale, start, run, FreeVariables(closure)) for closure, scale in part]
        if len(parts) < len(pairs) and not _changes_nothing(oracle):  # they have begun to
            start.put()
            del self.kept[-len(pairs) :]
            return self.first(oracle, closures, scaled, measure)
        return found

    def measure(self, engine: Trying, plan: StepPlan) -> None:
        """Measures the second round, unless that has been done or the first one suggests no step.

        The state of generators and model is the same afterwards as before.

        Raises:
            LossError: a closure reads a variable that holds something else than in the first round.
        """
        if plan.tried is not None:
            return
        losses = plan.gather(engine.exchange)
        plan.tried = []
        how = engine.estimator, engine.eps, engine.clip
        estimate, probes, _ = probes_from(*how, plan.seeds, plan.own, engine.exchange.populations)
        if estimate.skip is not None:
            return
        self._check_variables()
        normaliser = copy.copy(engine.normaliser)  # it sees the step when that is applied
        if normaliser is not None:
            try:
                normaliser.see(plan.step, probes, losses, engine.eps)
                probes = normaliser.apply(probes)
            except OverflowError:  # of a coefficient that float32 cannot hold: the step will be skipped
                return
        factor, groups = engine.optimizer.factor, engine.optimizer.groups_of(engine.slots)
        rates = {slot: number(group, "lr", math.nan) * factor for slot, group in groups.items()}
        points = tuple(Point(plan.seeds[0], multiple) for multiple in engine.estimator.multiples)
        second = replace(plan, points=points, mine=tuple(range(len(points))), probes=probes, rates=rates, sums=[])
        engine.directions.plan = second
        try:
            for each, found in zip(self.kept, self._losses(engine, second.to_measure), strict=True):
                second.add([each.scaled(loss) for loss in found])
        except QueryError as error:
            plan.failed, second.sums = str(error) or FAILED, []
            second.add([torch.full((), math.nan, dtype=torch.float64)] * len(points))
        finally:
            engine.directions.plan = plan
        own = [*second.losses(), float(bool(plan.failed))]
        *plan.tried, failed = engine.exchange.average(own)  # all of them measure all of it
        if failed and not plan.failed:
            plan.failed = f"{FAILED} in another process"

    def _check_variables(self) -> None:
        for index, each in enumerate(self.kept, 1):
            if names := each.variables.changed():
                raise LossError(
                    f"the closure of micro-batch {index} of {len(self.kept)} would now measure something else: "
                    f"{' and '.join(names)} changed after it was measured, and the second round of the step calls it "
                    f"once more; write zo.measure({bound(names)}), which keeps what it was measured with"
                )

    def _losses(self, engine: Trying, points: Sequence[Point]) -> list[list[Tensor]]:
        oracle = engine.oracle
        with engine.hidden():
            end = Start(oracle, self.kept[-1].start)
            try:
                found: list[list[Tensor]] = []
                with engine.around():
                    # In the sweeps of the first round: more probes in one of them would need more memory.
                    for _, group in groupby(self.kept, key=lambda each: id(each.start)):
                        first, *others = group
                        closures = [each.closure for each in (first, *others)]
                        first.start.put()
                        found += first.run(partial(oracle.together, points, closures))
                return found
            finally:
                end.put()


def _unscaled(loss: Tensor) -> Tensor:
    return loss


def _changes_nothing(oracle: Oracle) -> bool:
    """Whether forwards of a streamed model change nothing, so that all micro-batches can share a sweep."""
    return isinstance(oracle, LockstepOracle) and bool(oracle.quiet)
