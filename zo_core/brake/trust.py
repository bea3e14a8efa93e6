"""Notices steps that are too long for the noise between batches: does the loss fall by what it should?

A step of length a along a direction with slope g and curvature c changes the loss by ``-a r g + a^2 c / 2`` on average,
where r is the share of g that is not noise of the batch. The best length is ``r g / c``, and the loss falls by
``a^2 c / 2`` there: by as much as the curvature costs. A longer step lowers it by less than its cost, and one of twice
the best length not at all.

So losses to which the costs so far are added must not rise. They are collected in windows that begin at a step and
double in length: when there are 16, 32, 64, ... losses and as many after these, both halves are compared by Welch's t.
If the later ones are higher, by more than `LIMIT` normal deviates and by `RISE` of themselves, steps are too long. If
they are lower by as much, all is well, and the window begins with its second half. With independent losses and steps of
the very best length, 100,000 steps are 13 comparisons, and one gives a false alarm with a probability of 2% or less.

Where steps cost little beside the noise of the losses, as in large models, nothing can be seen, and nothing happens.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from .statistic import CHUNK, RISE, Alarm, Block, deviate

#: Normal deviate above which the loss has fallen by too little, and below minus which it has fallen by enough.
LIMIT = 3.0
#: Normal deviate below minus which the loss itself has fallen, so that the updates are kept.
FALLEN = 2.0


@dataclass(frozen=True)
class TooLong(Alarm):
    """Steps are too long for the noise.

    Attributes:
        best, loss: mean losses of the first and of the second half of the window.
        step: that of the alarm if the loss has clearly fallen between the halves, else that of the best weights.
        reason: what was noticed, for a message.
        cost: by how much the loss should have fallen between the halves.
    """

    cost: float

    def said(self, step: int) -> str:
        return (
            f"step {step}: steps are too long for the noise between batches; the loss went from {self.best:.4g} to "
            f"{self.loss:.4g} ({self.reason}), where steps of the right length lower it by {self.cost:.2g}"
        )


class Trust:
    """The test; `see` takes the loss of each step, and `paid` what its update costs.

    Attributes:
        cost: of all steps since the last alarm.
        before, now: losses with costs: those of the window's first half, and those since then.
        costs: sums of the costs that these contain.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """The next loss begins a window."""
        self.cost = 0.0
        self.before: Block | None = None
        self.now: Block | None = None
        self.costs = [0.0, 0.0]

    def paid(self, cost: float) -> None:
        """Takes what the curvature costs in the step that has just been applied."""
        self.cost += cost

    def see(self, step: int, loss: float, best: int) -> TooLong | None:
        """Takes the loss of the next step, before its update.

        Args:
            step: its index.
            loss: its loss.
            best: the step with the best weights so far.

        Returns:
            The alarm, after which a new window begins; None while all is well.
        """
        value = loss + self.cost
        if not math.isfinite(value):
            return None
        one = Block.of([value], step, step)
        self.now = one if self.now is None else self.now + one
        self.costs[1] += self.cost
        if self.now.count < (CHUNK if self.before is None else self.before.count):
            return None
        return self._judged(step, self.now, best)

    def _judged(self, step: int, now: Block, best: int) -> TooLong | None:
        before, costs = self.before, self.costs
        self.now, self.costs = None, [costs[1], 0.0]
        if before is None:
            self.before = now
            return None
        change, deviates = now.mean - before.mean, deviate(now, before)
        if deviates > LIMIT and change > RISE * abs(before.mean):
            cost = costs[1] / now.count - costs[0] / before.count
            fell = cost - change  # what is left of the costs is what the loss itself has done
            fallen = fell > 0.0 and deviates * fell / change > FALLEN
            self.restart()
            means = before.mean - costs[0] / before.count, now.mean - costs[1] / now.count
            return TooLong(means[0], step if fallen else best, means[1], f"means of {now.count} losses", cost)
        if deviates < -LIMIT:
            self.before = now
        else:
            self.before, self.costs = before + now, [costs[0] + costs[1], 0.0]
        return None

    # Checkpoints

    def saved(self) -> dict[str, Any]:
        """The state as plain values."""
        blocks = {
            name: None if block is None else asdict(block) for name, block in vars(self).items() if name in BLOCKS
        }
        return {"cost": self.cost, "costs": list(self.costs), **blocks}

    def load(self, saved: dict[str, Any]) -> None:
        """Restores what `saved` returned; nothing begins a window."""
        self.restart()
        if saved:
            self.cost, self.costs = saved["cost"], list(saved["costs"])
            self.before, self.now = (None if saved[name] is None else Block(**saved[name]) for name in BLOCKS)


#: The blocks of a `Trust`, as they are saved.
BLOCKS = ("before", "now")
