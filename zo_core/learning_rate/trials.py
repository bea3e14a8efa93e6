"""Trial runs of an engine, all of which are undone: what a search for a learning rate is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from ..brake import Braking
from ..errors import LossError, QueryError, SearchError
from ..modes import set_rng_state
from ..progress import Bar
from ..records import Point, StepRecord
from ..running import Running
from ..step import mean
from .snapshot import Snapshot

#: The first step index of trial runs, whose directions are far from those of any training run.
FIRST_STEP = 1 << 30
#: A run has broken if the loss of a batch has risen by this fraction of itself, or twice in a row by the second one.
BROKEN, RISEN = 0.1, 0.02
#: A decrease counts if it is this many times its standard error.
CERTAIN = 2.0


@dataclass(frozen=True)
class Trial:
    """The result of a trial run.

    Attributes:
        lr: its learning rate.
        change: change of the mean loss over all batches, from before the run to after it; infinite if the
            run was stopped because the loss had risen.
        error: standard error of ``change``, from the differences between batches.
        steps: how long it was, or when it was stopped.
        flat: whether its losses are those of a plateau, which do not depend on the learning rate.
    """

    lr: float
    change: float
    error: float = 0.0
    steps: int = 0
    flat: bool = False

    @property
    def learnt(self) -> bool:
        """Whether the loss has fallen by more than chance explains."""
        return not self.flat and self.change < -CERTAIN * self.error


class Trials:
    """Runs of an engine that start from the same weights, with the same directions and batches.

    Args:
        engine: must have measured nothing since its last step.
        closures: one per batch.
        forwards: how many calls of closures all runs may take together.

    Attributes:
        spent: how many calls there were; with several processes, in the one that has made most of them.
        points: forwards of a first step, in the process that measures most of them; later ones may take fewer.
        start: the loss on each batch before any step.
        changes: of the steps of the last run, each the difference between the loss and that of its batch at the start.
        bar: shows the calls.
    """

    def __init__(self, engine: Running, closures: Sequence[Callable[[], Any]], forwards: int, proportions: list[float]):
        self.engine, self.forwards, self.spent, self.proportions = engine, forwards, 0, proportions
        self.closures = [self._counted(closure) for closure in closures]
        self.points = self._cost_of_step()
        self.bar = Bar(forwards, "learning rate")
        self.before = Snapshot(engine)
        self.start: list[float] = []
        self.scale = 0.0
        #: How much the mean over the probes of a step is above the loss at the weights between them.
        self.bias = 0.0
        self.changes: list[float] = []
        #: The losses of a plateau, by batch.
        self.plateau: dict[int, float] = {}

    def _counted(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def counted() -> Any:
            self.spent += 1
            self.bar.advance(1)
            return closure()

        return counted

    @property
    def left(self) -> int:
        """How many calls are left."""
        return self.forwards - self.spent

    def _cost_of_step(self) -> int:
        return self.engine.most_points + len(self.engine.estimator.multiples)

    def close(self) -> None:
        """Restores the engine bit for bit."""
        self.bar.close()
        self.before.restore()

    def begin(self) -> None:
        """Measures the loss on every batch.

        Raises:
            LossError: one is not finite.
            SearchError: a query failed, here or in a later measurement.
        """
        engine = self.engine
        engine.listeners, engine.first_steps, engine.braking, engine.optimizer.factor = [], None, Braking(None), 1.0
        engine.look = None
        self.start = self.losses()
        self.scale = mean([abs(loss) for loss in self.start])
        if not math.isfinite(self.scale):
            raise LossError(f"the loss is not finite before any step ({self.start}), so no learning rate can be tested")

    def cost(self, steps: int) -> int:
        """Forwards of a run."""
        return steps * self.points + len(self.closures)

    def size(self) -> float:
        """How far a step of plain descent at rate 1 moves an element: root mean square, on the first batch."""
        self._rewind()
        self._set(0.0)
        self.bias = self._measure(0) - self.start[0]
        return math.sqrt(math.fsum(probe.coefficient**2 for probe in self._applied().probes))

    def run(self, lr: float, steps: int) -> Trial:
        """Trains at a constant rate; stops early if the loss has risen, or if there are not enough forwards left."""
        for step in self._steps(lambda step: lr, steps):
            if broken(self.changes, self.scale) or self._is_worse():
                return Trial(lr, math.inf, steps=step)
        losses = self.losses()
        changes = [after - before for after, before in zip(losses, self.start, strict=True)]
        change = mean(changes)
        if not math.isfinite(change):
            return Trial(lr, math.inf, steps=steps)
        spread = changes if len(changes) > 2 else [*changes, *self.changes[-(len(self.changes) // 2) :]]
        return Trial(lr, change, standard_error(spread), steps, self._is_flat(losses))

    def rising(self, lr: float, steps: int) -> float:
        """Trains at a rate that doubles in every step, until the loss has risen or does not change any more.

        Returns:
            The last rate before that.
        """
        stride = len(self.closures) * -(-7 // len(self.closures))
        losses: list[float] = []
        for step in self._steps(lambda step: lr * 2.0**step, steps):
            index = step % len(self.closures)
            losses.append(self.start[index] + self.changes[-1])
            if broken(self.changes, self.scale):
                return lr * 2.0 ** (step - 1)
            if self._is_level(losses, stride) and self._is_level(losses[:-1], stride):
                self.plateau = {(step - back) % len(self.closures): losses[step - back] for back in range(stride)}
                return lr * 2.0 ** (step - stride - 2)
        return lr * 2.0 ** (len(losses) - 1)

    def _is_worse(self) -> bool:
        """Whether the last round over the batches has higher losses than before the run, by more than chance."""
        count = len(self.closures)
        if count < 3 or len(self.changes) <= count:
            return False
        last = self.changes[-count:]
        return mean(last) > CERTAIN * standard_error(last)

    def _is_level(self, losses: list[float], stride: int) -> bool:
        """Whether the last loss is that of the same batch at a rate more than a hundred times smaller."""
        if len(losses) <= stride:
            return False
        now, then, start = losses[-1], losses[-1 - stride], self.start[(len(losses) - 1) % len(self.closures)]
        moved = abs(then - start)
        return moved > 1e-3 * self.scale and abs(now - then) <= 0.02 * moved

    def _is_flat(self, losses: list[float]) -> bool:
        if not self.plateau:
            return False
        away = [abs(losses[index] - level) for index, level in self.plateau.items()]
        moved = [abs(self.start[index] - level) for index, level in self.plateau.items()]
        return mean(away) <= 0.25 * mean(moved)

    def _steps(self, rate: Callable[[int], float], steps: int) -> Iterable[int]:
        """Takes steps; yields after each measurement, before the step is applied."""
        self._rewind()
        self.changes = []
        for step in range(steps):
            if self.left < self._cost_of_step():
                return
            index = step % len(self.closures)
            self._set(rate(step))
            self.changes.append(self._measure(index) - self.start[index] - self.bias)
            yield step
            self._applied()

    def _rewind(self) -> None:
        self.before.rewind()
        self.engine.at(FIRST_STEP)

    def _set(self, lr: float) -> None:
        for group, proportion in zip(self.engine.optimizer.param_groups, self.proportions, strict=True):
            group["lr"] = lr * proportion

    def _measure(self, index: int) -> float:
        """Measures a batch for the step in progress; the mean loss over the probes."""
        found = self.engine.losses([self.closures[index]])[0]
        self.engine.add(found)
        return self._shared([float(torch.stack(found).mean().to(torch.float32))], self.engine.query_failed)[0]

    def _applied(self) -> StepRecord:
        """Applies the step in progress, whose query may have failed in a second round."""
        record = self.engine.apply()
        if record.failed:
            _give_up(record.skipped or "")
        return record

    def losses(self) -> list[float]:
        """The loss on every batch at the current weights, with the same random numbers (dropout) each time."""
        set_rng_state(self.before.random)
        losses, failed = list[float](), ""
        try:
            losses += [float(self.engine.oracle.losses([Point(0, 0.0)], c)[0]) for c in self.closures]
        except QueryError as error:
            failed = str(error) or "a query failed"
        return self._shared(losses, failed)

    def _shared(self, losses: list[float], failed: str) -> list[float]:
        """The means over the processes of a run, so that all of them decide alike, and count their calls alike.

        Raises:
            SearchError: a query failed, in any process; on every one.
        """
        found = self.engine.exchange.everywhere((losses, self.spent, failed))
        self.spent = max(spent for _, spent, _ in found)
        for _, _, said in found:
            if said:
                _give_up(said)
        return [math.fsum(column) / len(found) for column in zip(*(each for each, _, _ in found), strict=True)]


def _give_up(failed: str) -> NoReturn:
    raise SearchError(
        [
            f"a query failed during the search for a learning rate ({failed}), which ends it; write a number for the "
            "learning rate, or repeat queries with zo_core.retrying"
        ]
    )


def broken(changes: Sequence[float], scale: float) -> bool:
    """Whether the loss has clearly risen in the last steps of a run."""
    if not changes[-1] <= BROKEN * scale:  # or it is NaN
        return True
    return len(changes) > 1 and min(changes[-2:]) > RISEN * scale


def standard_error(values: Sequence[float]) -> float:
    """Standard error of a mean."""
    count, middle = len(values), mean(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / max(1, count - 1) / count)
