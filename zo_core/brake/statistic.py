"""Notices when the loss has risen above the best it had: a sequential test with a stated error rate.

Losses are collected in chunks of 16, and chunks in aligned blocks of 1, 2, 4, 8, ... chunks. For each length the block
with the smallest mean is kept. Each block that is completed is compared with all of these by Welch's t, with the
variances within the two blocks, so a single outlier, which raises the variance as well, never raises an alarm. The t
is converted to a normal deviate. Its limit is such that, by a union bound over all pairs of blocks, a run of
100,000 steps whose losses are independent and have one distribution has a false alarm with a probability of 1% or less.

Two more tests are for losses that explode. The first losses of a run are compared with those that follow, because the
very first updates may be the ones that do harm. And some consecutive losses far above everything before, or some
that are not finite, raise an alarm at once.

Only the losses of the steps are used, in float32, so a log of them reproduces every decision. The memory is bounded.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..noise.direction import FLOAT32_MAX, float32

#: Number of losses in a chunk.
CHUNK = 16
#: Normal deviate above which a block is worse than the best one.
LIMIT = 6.5
#: Normal deviate below minus which a block is clearly below the first one of its length.
LEARNT = 4.0
#: The same for the comparison with the first losses, as they are and as logarithms; there are few of these tests. The
#: logarithm of a single loss, which may be near 0 by chance, has a limit of its own.
START_LIMIT, LOG_LIMIT, ONE_LOG_LIMIT = 5.0, 6.0, 8.0
#: The lengths of what counts as the first losses, and the numbers of losses after which they are compared with the
#: second half of these.
STARTS, AFTER = (1, 2, 4, 8), (32, 64, 128, 256)
#: How many times larger than the mean of the first losses three losses in a row have to be, to raise an alarm at once.
MULTIPLES = dict(zip(STARTS, (300.0, 50.0, 20.0, 10.0), strict=True))
#: A rise has to exceed this fraction of the best loss.
RISE = 0.01
#: How many standard deviations a single loss is above the best block if the weights are not to blame: with the weights
#: of that block, chance does this once in 700 times, and then the statistics begin anew at weights that are no worse.
AT_ONCE = 3.0
#: Number of consecutive losses that raise an alarm at once.
BURST = 3


@dataclass(frozen=True)
class Row:
    """Consecutive losses that raise an alarm at once.

    Attributes:
        count: how many.
        limit: how far they are above the best blocks, in standard deviations of a loss.
        ranges: how far they are above the largest loss before them, in units of the range of the losses before them.
            With 0 and 8 losses, this happens by chance once in 8e7 steps, whatever the distribution of the losses.
        rise: how far they are above the best loss, as a fraction.
    """

    count: int
    limit: float
    ranges: float
    rise: float = 0.1


#: An explosion, and a growth that is slower.
ROWS = (Row(BURST, 10.0, 2.0), Row(8, 4.0, 0.0))
#: The number of losses before them that these are compared with, and the smallest such number.
BEFORE, LEAST_BEFORE = 32, 16


@dataclass(frozen=True)
class Block:
    """Some consecutive finite losses.

    Attributes:
        count: how many there are.
        mean: their mean.
        squares: the sum of their squared differences from the mean.
        first, last: indices of the first and the last step.
    """

    count: int
    mean: float
    squares: float
    first: int
    last: int

    @classmethod
    def of(cls, losses: Sequence[float], first: int, last: int) -> Block:
        mean = math.fsum(losses) / len(losses)
        return cls(len(losses), mean, math.fsum((loss - mean) ** 2 for loss in losses), first, last)

    def __add__(self, later: Block) -> Block:
        """Both blocks together (Chan et al., 1979)."""
        count = self.count + later.count
        difference = later.mean - self.mean
        mean = self.mean + difference * (later.count / count)
        squares = self.squares + later.squares + difference * difference * (self.count * later.count / count)
        return Block(count, mean, squares, self.first, later.last)

    @property
    def middle(self) -> int:
        """The step in the middle."""
        return (self.first + self.last + 1) // 2

    @property
    def variance(self) -> float:
        return self.squares / (self.count - 1)

    @property
    def bound(self) -> float:
        """What the mean loss at these weights is below, up to chance; the smallest one marks the best block."""
        return self.mean + 4.0 * math.sqrt(self.variance / self.count)


@dataclass(frozen=True)
class Alarm:
    """The loss has risen.

    Attributes:
        best: mean loss of the best block.
        step: the step in the middle of the best block; the weights before this step are the best ones.
        loss: mean of the losses that are worse.
        reason: what was noticed, for a message.
        at_once: whether the first loss since the statistics began again was far above the best block, which is from
            before that.
        anew: whether it is another loss now, so that there is nothing to go back to.
    """

    best: float
    step: int
    loss: float
    reason: str
    at_once: bool = field(default=False, kw_only=True)
    anew: bool = field(default=False, kw_only=True)

    def said(self, step: int) -> str:
        """Describes the alarm, which was raised at a step."""
        return (
            f"step {step}: the loss has risen to {self.loss:.4g} ({self.reason}), and it was {self.best:.4g} around "
            f"step {self.step}"
        )


class Brake:
    """The test; `see` takes the loss of each step.

    Attributes:
        start: the step at which the statistics began.
        best: for each length the block with the smallest mean; the index is the logarithm of the number of chunks.
        firsts: for each length the first block.
        learnt: whether a block has been clearly below the first one.
        first: the step at which the statistics began, or began again.
    """

    def __init__(self, first: int = 0):
        self.start = first
        self.best: list[Block] = []
        self.firsts: list[Block] = []
        self.learnt = False
        self.restart(first)

    def restart(self, first: int) -> None:
        """Begins again at a step; the best blocks are kept."""
        self.first = first
        #: Finite losses of the chunk in progress, with the indices of their steps.
        self.chunk: list[tuple[int, float]] = []
        #: Blocks whose second half is still to come, by length.
        self.halves: dict[int, Block] = {}
        self.infinite = 0
        #: The first losses.
        self.early: list[float] = []
        self.recent: deque[float] = deque(maxlen=BEFORE + max(row.count for row in ROWS))

    def see(self, step: int, loss: float) -> Alarm | None:
        """Takes the loss of the next step.

        Returns:
            The alarm, after which the statistics begin again at the next step; None while all is well.
        """
        alarm = self._seen(step, loss) if math.isfinite(loss) else self._not_finite(step, loss)
        if alarm is not None:
            alarm = replace(alarm, at_once=self._at_once())
            self.restart(step + 1)
        return alarm

    def _at_once(self) -> bool:
        best = self.goal()
        if best is None or best.last >= self.first or not self.early:
            return False
        first = self.early[0]
        return _rise(first, best.mean, RISE) and first > best.mean + AT_ONCE * math.sqrt(best.variance)

    def earliest(self) -> int:
        """The earliest step that an alarm could name."""
        return min([self.first, *(block.middle for block in self.best)])

    def goal(self) -> Block | None:
        """The best block: the one with the smallest `Block.bound`."""
        return min(self.best, key=lambda block: block.bound, default=None)

    def _not_finite(self, step: int, loss: float) -> Alarm | None:
        self.infinite += 1
        if self.infinite < BURST or not self.recent:
            return None
        return self._alarm(loss, f"{BURST} losses in a row are not finite")

    def _seen(self, step: int, loss: float) -> Alarm | None:
        self.infinite = 0
        self.recent.append(loss)
        self.chunk.append((step, loss))
        start = self._since_start(loss)
        alarm = next(filter(None, map(self._in_a_row, ROWS)), start)
        if alarm is not None or len(self.chunk) < CHUNK:
            return alarm
        done, self.chunk = self.chunk, []
        return self._blocks(Block.of([value for _, value in done], done[0][0], done[-1][0]))

    def _blocks(self, block: Block) -> Alarm | None:
        """Compares a new block, and those that it completes, with the best ones of their length and above.

        The mean of a short block is too uncertain, where the distribution is skewed, to be compared with a long one.
        """
        level = 0
        while True:
            if any(best.last < block.first and _worse(block, best) for best in self.best[level:]):
                return self._alarm(block.mean, f"mean of {block.count} losses")
            if level == len(self.best):
                self.best.append(block)
                self.firsts.append(block)
            elif block.mean < self.best[level].mean:
                self.best[level] = block
                self.learnt = self.learnt or deviate(block, self.firsts[level]) < -LEARNT
            half = self.halves.pop(level, None)
            if half is None:
                self.halves[level] = block
                return None
            block, level = half + block, level + 1

    def _since_start(self, loss: float) -> Alarm | None:
        """Compares the first losses with later ones, as they are and as logarithms."""
        if len(self.early) == AFTER[-1]:
            return None
        self.early.append(loss)
        if len(self.early) < AFTER[0]:
            return self._exploded()
        if len(self.early) not in AFTER:
            return None
        later = self.early[len(self.early) // 2 :]
        now = math.fsum(later) / len(later)
        for count in STARTS:
            start = self.early[:count]
            mean = math.fsum(start) / count
            if _rise(now, mean, RISE) and _above(later, start):
                return Alarm(mean, self.first, now, f"mean of {len(later)} losses")
        return None

    def _exploded(self) -> Alarm | None:
        """Compares the last losses with the first ones, before there are any statistics."""
        before, last = self.early[:-BURST], self.early[-BURST:]
        if not before or min(self.early) <= 0.0 or min(last) < max(before):
            return None
        for count, multiple in MULTIPLES.items():
            mean = math.fsum(self.early[:count]) / count
            if len(before) >= count and min(last) > multiple * mean:
                reason = f"{BURST} losses in a row are many times larger"
                return Alarm(mean, self.first, math.fsum(last) / BURST, reason)
        return None

    def _in_a_row(self, row: Row) -> Alarm | None:
        """Compares the last losses with those before them, and with all that is known of the noise."""
        losses = list(self.recent)
        before, last = losses[: -row.count][-BEFORE:], losses[-row.count :]
        if not self.best or len(last) < row.count or (not row.ranges and len(before) < LEAST_BEFORE):
            return None
        limits = [best.mean + row.limit * math.sqrt(best.variance) for best in self.best]
        if before:
            limits.append(max(before) + row.ranges * (max(before) - min(before)))
        if not (min(last) > max(limits) and _rise(min(last), self.best[0].mean, row.rise)):
            return None
        return self._alarm(math.fsum(last) / row.count, f"{row.count} losses in a row are far above all others")

    def _alarm(self, loss: float, reason: str) -> Alarm:
        best = self.goal()
        if best is None:
            return Alarm(math.fsum(self.early) / len(self.early), self.first, loss, reason)
        return Alarm(best.mean, best.middle, loss, reason)

    # Checkpoints

    def saved(self) -> dict[str, Any]:
        """The state as plain values."""
        return {
            "start": self.start,
            "best": [asdict(block) for block in self.best],
            "firsts": [asdict(block) for block in self.firsts],
            "learnt": self.learnt,
            "first": self.first,
            "chunk": [list(one) for one in self.chunk],
            "halves": {level: asdict(block) for level, block in self.halves.items()},
            "infinite": self.infinite,
            "early": list(self.early),
            "recent": list(self.recent),
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Restores what `saved` returned."""
        self.restart(saved["first"])
        self.start, self.learnt = saved["start"], saved["learnt"]
        self.best = [Block(**block) for block in saved["best"]]
        self.firsts = [Block(**block) for block in saved["firsts"]]
        self.chunk = [(step, loss) for step, loss in saved["chunk"]]
        self.halves = {level: Block(**block) for level, block in saved["halves"].items()}
        self.infinite = saved["infinite"]
        self.early = list(saved["early"])
        self.recent.extend(saved["recent"])


def in_float32(loss: float) -> float:
    """The loss as a seed log holds it; beyond the range of float32 it is infinite."""
    if not math.isfinite(loss) or abs(loss) <= FLOAT32_MAX:
        return float32(loss)
    return math.copysign(math.inf, loss)


def normal_deviate(t: float, freedom: float) -> float:
    """The normal deviate with about the tail probability of Student's t (D. L. Wallace, 1959)."""
    shrink = (8.0 * freedom + 1.0) / (8.0 * freedom + 3.0)
    return math.copysign(shrink * math.sqrt(freedom * math.log1p(t * t / freedom)), t)


def _rise(now: float, best: float, fraction: float) -> bool:
    return now - best > fraction * abs(best)


def deviate(now: Block, best: Block) -> float:
    """The normal deviate of the difference between two blocks, by Welch's t; positive if the first one is above."""
    a, b = now.variance / now.count, best.variance / best.count
    difference = now.mean - best.mean
    if a + b == 0.0:
        return math.copysign(math.inf, difference) if difference else 0.0
    freedom = (a + b) ** 2 / (a * a / (now.count - 1) + b * b / (best.count - 1))
    return normal_deviate(difference / math.sqrt(a + b), freedom)


def _worse(now: Block, best: Block) -> bool:
    """Whether a block is significantly above another one, and by more than `RISE`."""
    return _rise(now.mean, best.mean, RISE) and deviate(now, best) > LIMIT


def _above(later: list[float], start: list[float]) -> bool:
    """Whether losses are significantly above a few others, whose variance is assumed to be theirs."""
    scales: list[tuple[Callable[[float], float], float]] = [(float, START_LIMIT)]
    if min(*start, *later) > 0.0:
        scales.append((math.log, ONE_LOG_LIMIT if len(start) == 1 else LOG_LIMIT))
    for scale, limit in scales:
        values = list(map(scale, later))
        mean, freedom = math.fsum(values) / len(values), len(values) - 1
        variance = math.fsum((value - mean) ** 2 for value in values) / freedom
        error = math.sqrt(variance * (1 / len(values) + 1 / len(start)))
        difference = mean - scale(math.fsum(start) / len(start))
        if difference > 0.0 and (error == 0.0 or normal_deviate(difference / error, freedom) > limit):
            return True
    return False
