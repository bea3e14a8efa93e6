"""A learning-rate range test: short trial runs at several rates, all of which are undone.

It drives an engine through its ordinary steps, so it works with every estimator, rule and model, and
knows nothing about what they compute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .errors import ConfigError, LossError, ShortRunError
from .lr_trials import Trial, Trials, mean
from .running import Running

#: Forwards of the search, the part of the run's forwards that it may take, and the fewest that are of any use.
FORWARDS, SHARE, LEAST = 512, 0.1, 48
#: If the length of the run is not known, it is taken to be this many times that of a trial.
LONGER = 20
#: Steps of the run with a rising rate, its first rate (by which a step moves an element by this fraction of eps),
#: and the factor by which the first trial stays below the rate at which that run broke, per square root of steps.
RISING_STEPS, HARMLESS = 48, 0.125
#: A rate is good if a trial achieves this fraction of the largest decrease.
ENOUGH = 0.75
#: Parts of the search: number of trials that it should have room for, and the share of forwards kept for the last run.
TRIALS, LAST = 4, 0.0
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
        forwards: how many calls of closures it may take; None takes 512, or a tenth of the run's if that is less.
        steps: length of the run that the rate is for; None if it is not known.

    Raises:
        ConfigError: no rate lowers the loss.
        ShortRunError: so few forwards are of no use.
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
    points = len(engine.estimator.points(tuple(range(engine.num_probes)), engine.eps))
    budget = forwards or (FORWARDS if steps is None else min(FORWARDS, int(SHARE * steps * points)))
    if budget < LEAST:
        raise ShortRunError(
            [
                f"{budget} forwards are too few to search a learning rate, which takes {LEAST} or more; pass forwards={LEAST} "
                "or more, or write a number for the learning rate"
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

    A step moves the weights mostly in a random direction. After k steps at rate r they are about ``r sqrt(k)`` away
    from where they would be without noise, so a run of T steps at r goes as far as one of k steps at ``r sqrt(T / k)``.
    That is how short trials tell which rate a long run endures.
    """

    def __init__(self, trials: Trials, steps: int | None):
        self.trials, self.steps = trials, steps
        self.done: dict[float, Trial] = {}

    def run(self, budget: int) -> LrSuggestion:
        trials = self.trials
        trials.begin()
        lr = HARMLESS * trials.engine.eps / max(trials.size(), 1e-30)
        rates = trials.rising(lr, min(RISING_STEPS, budget // 3 // trials.points))
        kept = round(LAST * budget)
        length = max(4, ((trials.left - kept) // (TRIALS if budget >= 256 else 3) - len(trials.closures)) // trials.points)
        self.length = length
        steps = self.steps or LONGER * length
        self._explore(rates[-1] / math.sqrt(length), kept)
        lr, limit = self.choose(steps)
        lr = self._confirmed(lr, steps)
        curve = tuple(self.done[rate] for rate in sorted(self.done))
        return LrSuggestion(lr, mean(trials.start), curve, limit, steps, budget - trials.left)

    def _try(self, lr: float, steps: int) -> Trial:
        self.done[lr] = self.trials.run(lr, steps)
        return self.done[lr]

    def _room(self, kept: int) -> bool:
        return self.trials.left - kept >= self.trials.cost(self.length)

    def _explore(self, lr: float, kept: int) -> None:
        """Trials at rates a factor of 2 apart, upwards while they achieve more, else downwards."""
        trial = self._try(lr, self.length)
        factor = 4.0
        while not trial.learnt and self._room(0 if not self._good() else kept):
            lr /= factor
            trial = self._try(lr, self.length)
        if not trial.learnt:
            raise ConfigError(
                [
                    "no learning rate lowers the loss by more than the differences between batches: it does not depend "
                    "on the weights that move, or the batches differ too much; pass more batches, or more forwards="
                ]
            )
        while self._room(kept):
            above = next((rate for rate in sorted(self.done) if rate > lr), math.inf)
            if above <= 2.9 * lr:
                break
            up = min(2.0 * lr, math.sqrt(lr * above))
            trial = self._try(up, self.length)
            if trial.learnt and trial.change <= ENOUGH * min(t.change for t in self._good()):
                lr = up
        while self._room(kept):
            lowest = min(self._good(), key=lambda t: t.lr)
            if lowest.change > ENOUGH * min(t.change for t in self._good()):
                break
            if lowest.lr > self.choose((self.steps or LONGER * self.length))[0]:
                break
            self._try(lowest.lr / 2.0, self.length)

    def _good(self) -> list[Trial]:
        return [trial for trial in self.done.values() if trial.learnt]

    def choose(self, steps: int) -> tuple[float, float]:
        good = self._good()
        best = min(trial.change for trial in good)
        enough = [trial.lr for trial in good if trial.change <= ENOUGH * best]
        limit = min((rate for rate in self.done if rate > max(enough)), default=math.inf)
        endured = math.sqrt(max(enough) * min(limit, 2.0 * max(enough)))
        return min(min(enough), endured * math.sqrt(min(1.0, self.length / steps))), limit

    def _confirmed(self, lr: float, steps: int) -> float:
        """The rate after a last run, which is as long as what is left allows, at the rate that goes as far as the whole run."""
        length = self.trials.left // self.trials.points - 4
        if length < self.length:
            return lr
        raised = lr * math.sqrt(max(1.0, steps / length))
        trial = self.trials.run(raised, length)
        self.last = (raised, length, trial)
        if math.isfinite(trial.change) and trial.learnt:
            return lr
        return lr / 2.0
