"""A learning-rate range test: short trial runs at increasing rates, all of which are undone.

It drives an engine through its ordinary steps, so it works with every estimator, rule and model, and
knows nothing about what they compute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .braking import Braking
from .errors import ConfigError, LossError
from .modes import set_rng_state
from .records import Point
from .running import Running
from .snapshot import Snapshot

Closure = Callable[[], Any]

#: The first step index of trial runs, whose directions are far from those of any training run.
FIRST_STEP = 1 << 30
#: Forwards of a trial run, and its minimum number of steps.
FORWARDS, LEAST_STEPS = 128, 16
#: The search for an upper bound: steps of a trial, and the factor between rates. The first rate moves an
#: element by this fraction of eps.
SCOUT_STEPS, SCOUT_FACTOR, SCOUT_START = 8, 8.0, 1e-3
#: What schedulers keep in a group besides its rate.
SCHEDULED = ("initial_lr", "max_lr", "min_lr")
#: After this many trials, a search is given up.
TRIALS = 32
#: A trial has blown up if the loss has grown by this fraction of itself.
BLOWN = 0.1
#: A rate is good if it achieves this fraction of the largest decrease.
ENOUGH = 0.9
#: Factors by which the suggestion stays below the median of the good rates, and below the first harmful one.
MARGIN, LIMIT_MARGIN = 2.0, 4.0


@dataclass(frozen=True)
class Trial:
    """The result of a trial run.

    Attributes:
        lr: its learning rate.
        change: change of the mean loss over all batches, from before the run to after it; infinite if the
            run was stopped because the loss had blown up.
    """

    lr: float
    change: float


@dataclass(frozen=True)
class LrSuggestion:
    """What a range test found; ``float(suggestion)`` is the rate.

    Attributes:
        lr: the suggested learning rate.
        loss: mean loss over the batches before the trials.
        curve: the trial runs, by increasing learning rate.
        limit: the lowest rate at which a trial run raised the loss; infinite if none did.
        steps: length of a trial run.
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
        lines = [f"{'lr':>9}  {'loss change':>11}  after {self.steps} steps, from a loss of {self.loss:.4g}"]
        for trial in self.curve:
            bar = "#" * max(0, round(30 * -trial.change / largest)) if math.isfinite(trial.change) else "blown up"
            lines.append(f"{trial.lr:>9.2e}  {trial.change:>+11.4g}  {bar}".rstrip())
        return "\n".join([*lines, f"{self.lr:>9.2e}  suggested"])

    def __str__(self) -> str:
        return self.table()


def range_test(engine: Running, closures: Sequence[Closure], steps: int | None = None) -> LrSuggestion:
    """Finds a rate by trial runs from the engine's current state; see `zo_core.suggest_lr`.

    Afterwards weights, rule state, learning rates, random generators and the step count are restored
    bit for bit, also after an exception.

    Args:
        engine: must have measured nothing since its last step. The rates of its groups keep their proportions.
        closures: one per batch, each returning the loss of its batch.
        steps: length of a trial run; None takes 128 forwards, and at least 16 steps.

    Raises:
        ConfigError: trained weights are streamed, or no rate lowers the loss.
        LossError: ``closures`` are not functions, or the loss is not finite before any step.
    """
    if not closures or not all(callable(closure) for closure in closures):
        raise LossError(
            f"closure={closures!r} must be a function that returns the loss, or a list of such functions, one for "
            "each batch: [lambda: model(**batch).loss for ...] needs batch=batch as a default argument of each lambda"
        )
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        raise ConfigError([f"steps={steps!r} must be a whole number of at least 1, or None"])
    with engine.hidden():
        test = _Test(engine, closures, steps)
        try:
            return test.run()
        finally:
            test.before.restore()


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


class _Test:
    """One range test, made of trials that all start from the same snapshot."""

    def __init__(self, engine: Running, closures: Sequence[Closure], steps: int | None):
        self.engine, self.closures, self.before = engine, closures, Snapshot(engine)
        self.points = len(engine.estimator.points(tuple(range(engine.num_probes)), engine.eps))
        self.steps = steps or max(LEAST_STEPS, round(FORWARDS / self.points))
        self.forwards = 0
        base = base_rates(engine.optimizer)
        self.proportions = [rate / base[0] if base[0] else 1.0 for rate in base]
        self.start: list[float] = []
        self.scale = 0.0

    def run(self) -> LrSuggestion:
        engine = self.engine
        engine.listeners, engine.first_steps, engine.braking = [], None, Braking(None)
        engine.optimizer.factor = 1.0
        self.start = self._losses()
        self.scale = _mean(map(abs, self.start))
        if not math.isfinite(self.scale):
            raise LossError(f"the loss is not finite before any step ({self.start}), so no learning rate can be tested")
        trials = self._curve(self._blown_rate())
        best = min(trial.change for trial in trials)
        good = [trial.lr for trial in trials if trial.change <= ENOUGH * best]
        enough = good[(len(good) - 1) // 2]  # several rates may learn all that can be learnt quickly
        limit = next((trial.lr for trial in trials if trial.lr > enough and trial.change > 0.0), math.inf)
        lr = min(enough / MARGIN, limit / LIMIT_MARGIN)
        return LrSuggestion(lr, _mean(self.start), tuple(trials), limit, self.steps, self.forwards)

    def _curve(self, lr: float) -> list[Trial]:
        """Trials at decreasing rates, until two in a row achieve less than the best; by increasing rate."""
        trials: list[Trial] = []
        worse, best = 0, 0.0
        while worse < 2:
            if len(trials) == TRIALS:
                raise ConfigError(
                    [
                        "no learning rate lowers the loss: it does not depend on the weights that move, or the batches "
                        f"differ too much for trials of {self.steps} steps; pass more batches, or a larger steps="
                    ]
                )
            lr /= 2.0
            trials.append(Trial(lr, self._trial(lr, self.steps)))
            worse = worse + 1 if best < 0.0 and trials[-1].change > ENOUGH * best else 0
            best = min(best, trials[-1].change)
        return trials[::-1]

    def _blown_rate(self) -> float:
        """A rate that does harm within a few steps, found by trials at increasing rates."""
        lr = SCOUT_START * self.engine.eps / max(1.0, self._size())
        for _ in range(TRIALS):
            if self._trial(lr, SCOUT_STEPS) > BLOWN * self.scale:
                break
            lr *= SCOUT_FACTOR
        return lr

    def _size(self) -> float:
        """How far a step of plain descent at rate 1 moves an element: root mean square, on the first batch."""
        self._begin(0.0)
        self._measure(0)
        return math.sqrt(math.fsum(probe.coefficient**2 for probe in self.engine.apply().probes))

    def _begin(self, lr: float) -> None:
        self.before.rewind()
        self.engine.at(FIRST_STEP)
        for group, proportion in zip(self.engine.optimizer.param_groups, self.proportions, strict=True):
            group["lr"] = lr * proportion

    def _trial(self, lr: float, steps: int) -> float:
        """The change of the mean loss by a run of ``steps`` steps; infinite if it blew up."""
        self._begin(lr)
        for step in range(steps):
            index = step % len(self.closures)
            loss = self._measure(index)
            if not loss - self.start[index] <= self.scale:  # or it is NaN
                return math.inf
            self.engine.apply()
        change = _mean(self._losses()) - _mean(self.start)
        return change if math.isfinite(change) else math.inf

    def _measure(self, index: int) -> float:
        """Measures a batch for the step in progress; the mean loss over the probes."""
        found = self.engine.losses([self.closures[index]])[0]
        self.engine.add(found)
        self.forwards += self.points
        return float(torch.stack(found).mean().to(torch.float32))

    def _losses(self) -> list[float]:
        """The loss on every batch at the current weights, with the same random numbers (dropout) each time."""
        set_rng_state(self.before.random)
        self.forwards += len(self.closures)
        return [float(self.engine.oracle.losses([Point(0, 0.0)], closure)[0]) for closure in self.closures]


def _mean(values: Iterable[float]) -> float:
    kept = list(values)
    return math.fsum(kept) / len(kept) if all(map(math.isfinite, kept)) else math.nan
