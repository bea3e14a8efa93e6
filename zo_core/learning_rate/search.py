"""A learning-rate range test: short trial runs at several rates, all of which are undone.

It drives an engine through its ordinary steps, so it works with every estimator, rule and model, and
knows nothing about what they compute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from ..errors import ConfigError, LossError, SearchError
from ..running import Running
from ..step import mean
from .trials import Trial, Trials

#: Forwards of the search, and the part of the run's forwards that it may take. A run in which that is less than
#: `FORWARDS` takes the default rate, which was better then. Whoever passes a budget needs these forwards and steps.
FORWARDS, SHARE, LEAST, LEAST_STEPS = 512, 0.1, 128, 24
#: If the length of the run is not known, it is taken to be this many times that of a trial.
LONGER = 20
#: Most steps of the run with a rising rate, and its first rate: a step moves an element by this fraction of eps.
RISING_STEPS, HARMLESS, TINY = 48, 0.125, 1e-30
#: A rate is good if a trial achieves this fraction of the largest decrease.
ENOUGH = 0.75
#: A trial is so long that there are forwards for this many, or for one less with few forwards.
TRIALS, FEW = 4, 256
#: What schedulers keep in a group besides its rate.
SCHEDULED = ("initial_lr", "max_lr", "min_lr")


@dataclass(frozen=True)
class LrSuggestion:
    """What a range test found; ``float(suggestion)`` is the rate.

    Attributes:
        lr: the suggested learning rate.
        loss: mean loss over the batches before the trials.
        curve: the trial runs, by increasing learning rate.
        limit: the lowest rate at which a trial run did worse than at a lower one; infinite if none did.
        steps: length of the run that the rate is for.
        forwards: total number of closure calls.
    """

    lr: float
    loss: float
    curve: tuple[Trial, ...]
    limit: float
    steps: int
    forwards: int

    def __float__(self) -> float:
        return self.lr

    def table(self) -> str:
        """The curve as text, with a bar for the decrease at each rate."""
        largest = max(-trial.change for trial in self.curve)
        lines = [f"{'lr':>9}  {'loss change':>11}  from a loss of {self.loss:.4g}"]
        for trial in self.curve:
            bar = "#" * max(0, round(30 * -trial.change / largest)) if math.isfinite(trial.change) else "blown up"
            lines.append(f"{trial.lr:>9.2e}  {trial.change:>+11.4g}  {bar}".rstrip())
        return "\n".join([*lines, f"{self.lr:>9.2e}  suggested for {self.steps} steps"])

    def summary(self) -> str:
        """One line: the rate, what it took to find it, and what it achieved."""
        best = min(self.curve, key=lambda trial: trial.change)
        return (
            f"learning rate {self.lr:.2g}, found by {self.forwards} forwards for a run of {self.steps} steps: "
            f"a trial of {best.steps} steps lowered the loss from {self.loss:.4g} by {-best.change:.2g}"
        )

    def __str__(self) -> str:
        return self.table()


def range_test(
    engine: Running, closures: Sequence[Callable[[], Any]], forwards: int | None = None, steps: int | None = None
) -> LrSuggestion:
    """Finds a rate by trial runs from the engine's current state; see `zo_core.suggest_lr`.

    Afterwards weights, rule state, learning rates, random generators and the step count are restored
    bit for bit, also after an exception.

    Args:
        engine: must have measured nothing since its last step. The rates of its groups keep their proportions.
        closures: one per batch, each returning the loss of its batch.
        forwards: how many calls of closures it may take; None takes 512.
        steps: length of the run that the rate is for; None if it is not known. Without ``forwards``, a search may take
            a tenth of the forwards of the run, which have to be 512 or more.

    Raises:
        SearchError: no rate lowers the loss, or so few forwards are of no use.
        LossError: ``closures`` are not functions, or the loss is not finite before any step.
    """
    if not closures or not all(callable(closure) for closure in closures):
        raise LossError(
            f"closure={closures!r} must be a function that returns the loss, or a list of such functions, one for "
            "each batch: [lambda: model(**batch).loss for ...] needs batch=batch as a default argument of each lambda"
        )
    for name, value in (("forwards", forwards), ("steps", steps)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ConfigError([f"{name}={value!r} must be a whole number of at least 1, or None"])
    points = len(engine.estimator.points(tuple(range(engine.own_probes)), engine.eps))
    points += len(engine.estimator.multiples)
    if forwards is None and steps is not None and SHARE * steps * points < FORWARDS:
        raise SearchError(
            [
                f"{int(SHARE * steps * points)} forwards, a tenth of what {steps} steps take, are too few to find a "
                f"learning rate that is better than the default (a search takes {FORWARDS}); leave the learning rate "
                "out, or pass forwards= to suggest_lr"
            ]
        )
    budget, least = forwards or FORWARDS, max(LEAST, LEAST_STEPS * points)
    if budget < least:
        raise SearchError(
            [
                f"{budget} forwards are too few to search a learning rate with; pass forwards={least} or more "
                "to suggest_lr, or write a number for the learning rate"
            ]
        )
    base = base_rates(engine.optimizer)
    proportions = [rate / base[0] if base[0] else 1.0 for rate in base]
    with engine.hidden():
        trials = Trials(engine, closures[: max(2, budget // 24)], budget, proportions)
        try:
            return _Search(trials, steps).run(budget)
        finally:
            trials.close()


def rate_groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The groups that hold the rates that schedulers change; for a face, those of its inner optimizer."""
    return getattr(optimizer, "inner", optimizer).param_groups


def base_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    """The rate of each group without its schedule.

    Raises:
        ConfigError: the optimizer has no learning rate.
    """
    groups = rate_groups(optimizer)
    if any(group.get("lr") is None for group in groups):
        inner = type(getattr(optimizer, "inner", optimizer)).__name__
        raise ConfigError([f"{inner} has no learning rate (lr=None) that could be searched; give it a number"])
    return [float(group.get("initial_lr", group["lr"])) for group in groups]


def check_replaceable(optimizer: torch.optim.Optimizer, schedulers: Sequence[Any]) -> None:
    """Raises `ConfigError` if `set_lr` could not replace the optimizer's rate."""
    if base_rates(optimizer)[0] == 0.0:
        raise ConfigError(
            ["lr='auto' was given with an optimizer whose lr is 0; write any other, which will be replaced"]
        )
    if not schedulers and any("initial_lr" in group for group in rate_groups(optimizer)):
        raise ConfigError(
            [
                "lr='auto' was given with a learning-rate scheduler, which has computed its rates already; call "
                "zo_core.suggest_lr first, and write the rate it returns"
            ]
        )


def set_lr(optimizer: torch.optim.Optimizer, lr: float, schedulers: Sequence[Any] = ()) -> None:
    """Sets the rate of the first group, before any schedule, and scales those of the others in proportion.

    Args:
        optimizer: its groups may already follow a schedule, for example a warmup from 0.
        lr: the new rate.
        schedulers: all schedulers of the optimizer.
    """
    factor = lr / base_rates(optimizer)[0]
    for group in rate_groups(optimizer):
        for name in ("lr", *SCHEDULED):
            if name in group:
                group[name] = group[name] * factor
    for scheduler in schedulers:
        for name in ("base_lrs", "_last_lr", "min_lrs"):
            if isinstance(rates := getattr(scheduler, name, None), list):
                setattr(scheduler, name, [rate * factor for rate in rates])


class _Search:
    """One search.

    The noise of a step moves the weights in a random direction. After k steps at rate r it has moved them about
    ``r sqrt(k)`` away, so a run of T steps at r goes as far as one of k steps at ``r sqrt(T / k)``. That is how short
    trials tell which rate a long run endures.
    """

    def __init__(self, trials: Trials, steps: int | None):
        self.trials, self.steps = trials, steps
        self.done: dict[float, Trial] = {}
        self.length = 0

    def run(self, budget: int) -> LrSuggestion:
        trials = self.trials
        trials.begin()
        first = HARMLESS * trials.engine.eps / max(trials.size(), TINY)
        edge = trials.rising(first, min(RISING_STEPS, budget // 3 // trials.points))
        room = trials.left // (TRIALS if budget > FEW else TRIALS - 1) - len(trials.closures)
        self.length = max(4, room // trials.points)
        steps = self.steps or LONGER * self.length
        self._descend(edge / math.sqrt(self.length))
        if not self._good():
            self._give_up(budget)
        self._ascend(self._good()[-1].lr)
        self._find_smaller(steps)
        lr = self._confirmed(self._endured(steps), steps)
        curve = tuple(self.done[rate] for rate in sorted(self.done))
        return LrSuggestion(lr, mean(trials.start), curve, self._limit(), steps, budget - trials.left)

    def _try(self, lr: float, steps: int) -> Trial:
        self.done[lr] = self.trials.run(lr, steps)
        return self.done[lr]

    @property
    def _room(self) -> bool:
        """Whether there are enough forwards left for another trial."""
        return self.trials.left >= self.trials.cost(self.length)

    def _good(self) -> list[Trial]:
        """Trials that lowered the loss, by increasing rate."""
        return sorted((trial for trial in self.done.values() if trial.learnt), key=lambda trial: trial.lr)

    def _enough(self) -> list[Trial]:
        """Those that achieve most of the largest decrease."""
        best = min(trial.change for trial in self._good())
        return [trial for trial in self._good() if trial.change <= ENOUGH * best]

    def _limit(self) -> float:
        """The lowest rate that is too high."""
        return min((lr for lr in self.done if lr > self._enough()[-1].lr), default=math.inf)

    def _endured(self, steps: int) -> float:
        """The smallest rate that achieves most of the decrease, but none that so many steps would not endure."""
        enough = self._enough()
        top = enough[-1]
        between = math.sqrt(top.lr * min(self._limit(), 2.0 * top.lr))
        return min(enough[0].lr, between * math.sqrt(min(1.0, top.steps / steps)))

    def _descend(self, lr: float) -> None:
        """Trials at decreasing rates, until one lowers the loss."""
        unclear = 0
        while self._room:
            trial = self._try(lr, self.length)
            unclear += math.isfinite(trial.change) and not trial.flat
            if trial.learnt:
                return
            if unclear == 2:
                break
            lr /= 4.0
        # Decrease and noise both shrink with the rate, so a smaller one would not be clearer, but a longer trial is.
        longest = (self.trials.left - len(self.trials.closures)) // self.trials.points
        if unclear and longest > self.length:
            self._try(lr, longest)

    def _ascend(self, lr: float) -> None:
        """Trials at increasing rates, until one is too high."""
        while self._room:
            above = min((rate for rate in self.done if rate > lr), default=math.inf)
            if above < 3.0 * lr:
                break
            lr = min(2.0 * lr, math.sqrt(lr * above))
            if self._try(lr, self.length) not in self._enough():
                break

    def _find_smaller(self, steps: int) -> None:
        """Trials at decreasing rates, as long as they achieve as much, down to what the run endures in any case."""
        while self._room and (lowest := self._good()[0]) in self._enough() and lowest.lr <= self._endured(steps):
            self._try(lowest.lr / 2.0, self.length)

    def _confirmed(self, lr: float, steps: int) -> float:
        """The rate after a last run, as long as the forwards allow, which goes as far as the whole run at this rate."""
        length = (self.trials.left - len(self.trials.closures)) // self.trials.points
        if length <= self.length:
            return lr
        last = self.trials.run(lr * math.sqrt(max(1.0, steps / length)), length)
        return lr if last.learnt else lr / 2.0

    def _give_up(self, budget: int) -> NoReturn:
        if budget < FORWARDS:
            raise SearchError(
                [
                    f"{budget} forwards, {self.trials.spent} of them used, have shown no learning rate that lowers the "
                    "loss by more than the batches differ; pass more forwards=, or write a number for the learning rate"
                ],
                noisy=True,
            )
        raise SearchError(
            [
                "no learning rate lowers the loss by more than the batches differ: it does not depend on the weights "
                "that move, or there is too much noise; pass more batches, or more forwards="
            ],
            noisy=True,
        )
