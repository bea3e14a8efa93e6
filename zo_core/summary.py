"""The numbers of a log line. Single losses look like noise: a line has their running mean and its standard error."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from .noise.direction import FLOAT32_MAX, float32
from .records import StepRecord

#: Steps in the running mean of the loss.
WINDOW = 500


class Summary:
    """What to log about the steps of a run:

        summary = Summary()
        zo.listeners.append(summary.add)
        ...
        print(summary.numbers())                                     # every 100 steps, for example

    It takes the same memory however many steps there are between two lines.

    Attributes:
        steps: number of steps since the last line.
    """

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._next_step = 0
        self._begin_line()

    def _begin_line(self) -> None:
        self.steps = 0
        self._grads, self._squares = 0, 0.0
        self._skipped = self._clipped = 0
        self._lr = math.nan
        self._scored, self._score, self._variance = 0, 0.0, 0.0
        self._least, self._most = math.inf, -math.inf

    def add(self, record: StepRecord) -> None:
        """Counts a step. If it is not after the last one, a callback has gone back, and everything begins again."""
        if record.step < self._next_step:
            self._losses.clear()
            self._begin_line()
        self._next_step = record.step + 1
        self.steps += 1
        self._see([record.loss])
        self._skipped += record.skipped is not None or record.without_signal
        self._clipped += record.clipped
        self._lr = record.lr
        if math.isfinite(record.projected_grad):
            self._grads += 1
            self._squares += record.projected_grad * record.projected_grad
        if record.scores is not None:
            self._scored += 1
            self._score += record.scores.mean
            self._variance += record.scores.std**2
            self._least, self._most = min(self._least, record.scores.min), max(self._most, record.scores.max)

    def resume(self, losses: Iterable[float]) -> None:
        """Puts the losses of the steps before a resumed run into the window, as its seed log has them."""
        self._see(losses)

    def _see(self, losses: Iterable[float]) -> None:
        # In float32, as a seed log stores them, so that a resumed run has the same mean to the last bit.
        self._losses.extend(float32(loss) for loss in losses if abs(loss) <= FLOAT32_MAX)

    def numbers(self) -> dict[str, float]:
        """Returns the numbers of a line, and begins the next one.

        Returns:
            ``projected_grad``, the root mean square over the steps since the last line, NaN if none has one; missing
            where steps only compare scores.

            ``zo_loss_mean``, the mean of the last 500 finite losses, one per step, and ``zo_loss_se``, its standard
            error, as for independent losses: standard deviation / sqrt(count). They are missing as long as there
            are no losses, or only one.

            ``zo_score_mean``, ``zo_score_std``, ``zo_score_min`` and ``zo_score_max`` over the steps since the last
            line, if records have scores: the mean, the root mean square of the standard deviations within a step, and
            the extremes.

            ``zo_lr``, the rate that the last step applied; missing if its optimizer has none.

            ``zo_skipped_steps`` and ``zo_clipped_directions``, the counts since the last line, if not 0.
        """
        result = {}
        if self._grads or not self._scored:
            result["projected_grad"] = math.sqrt(self._squares / self._grads) if self._grads else math.nan
        count = len(self._losses)
        if count:
            result["zo_loss_mean"] = mean = math.fsum(self._losses) / count
            if count > 1:
                squares = math.fsum((loss - mean) * (loss - mean) for loss in self._losses)
                result["zo_loss_se"] = math.sqrt(squares / (count - 1) / count)
        result |= self._scores()
        if math.isfinite(self._lr):
            result["zo_lr"] = self._lr
        counts = {"zo_skipped_steps": self._skipped, "zo_clipped_directions": self._clipped}
        self._begin_line()
        return {**result, **{name: float(number) for name, number in counts.items() if number}}

    def _scores(self) -> dict[str, float]:
        if not self._scored:
            return {}
        return {
            "zo_score_mean": self._score / self._scored,
            "zo_score_std": math.sqrt(self._variance / self._scored),
            "zo_score_min": self._least,
            "zo_score_max": self._most,
        }
