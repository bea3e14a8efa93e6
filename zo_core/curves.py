"""What a run did, in little memory however long it is: curves of a few hundred points, and where the time went."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

#: Maximum number of points of a curve; when there are more, neighbours are merged.
POINTS = 512
#: Maximum number of events that are listed one by one.
EVENTS = 20


@dataclass(slots=True)
class Bucket:
    """Some consecutive steps, as one point of each curve.

    Attributes:
        step: index of the first one.
        steps: their number.
        losses, loss: number of finite losses, and their sum.
        grads, squares: number of finite projected gradients, and the sum of their squares.
        lr: learning rate of the last one.
        skipped: number of skipped ones.
        memory: memory of the process or the device after the last one, in bytes.
    """

    step: int
    steps: int = 0
    losses: int = 0
    loss: float = 0.0
    grads: int = 0
    squares: float = 0.0
    lr: float = math.nan
    skipped: int = 0
    memory: float = math.nan

    def take(self, other: Bucket) -> None:
        """Adds the steps of the bucket after this one."""
        self.steps += other.steps
        self.losses += other.losses
        self.loss += other.loss
        self.grads += other.grads
        self.squares += other.squares
        self.lr, self.memory = other.lr, other.memory
        self.skipped += other.skipped


class Curves:
    """Curves of a run, from its steps in order.

    Attributes:
        buckets: the points; all but the last one have `width` steps.
        width: steps per point.
        events: skipped steps and rollbacks with their reason, the first `EVENTS` of them.
        reasons: how often each reason was given.
        next_step: the step after the last one.
        clock: where the time went.
    """

    def __init__(self) -> None:
        self.clock = Clock()
        self._begin()

    def _begin(self) -> None:
        self.buckets: list[Bucket] = []
        self.events: list[tuple[int, str]] = []
        self.reasons: Counter[str] = Counter()
        self.width, self.next_step = 1, 0

    def add(
        self,
        step: int,
        loss: float,
        grad: float,
        lr: float,
        skipped: str | None,
        memory: Callable[[], float] = lambda: math.nan,
    ) -> None:
        """Adds a step. If it is not after the last one, the run has gone back, and the curves begin again.

        Args:
            step, loss, grad, lr, skipped: as in its `StepRecord`.
            memory: the memory now, in bytes; called once for each point of the curves.
        """
        if step < self.next_step:
            self._begin()
        self.next_step = step + 1
        if not self.buckets or self.buckets[-1].steps >= self.width:
            self._make_room()
            self.buckets.append(Bucket(step))
        one = Bucket(step, 1, lr=lr, skipped=skipped is not None, memory=self.buckets[-1].memory)
        if math.isfinite(loss):
            one.losses, one.loss = 1, loss
        if math.isfinite(grad) and abs(grad) < 1e150:
            one.grads, one.squares = 1, grad * grad
        self.buckets[-1].take(one)
        if self.buckets[-1].steps == self.width:
            self.buckets[-1].memory = memory()
        if skipped is not None:
            if len(self.events) < EVENTS:
                self.events.append((step, skipped))
            if skipped in self.reasons or len(self.reasons) < EVENTS:
                self.reasons[skipped] += 1

    def _make_room(self) -> None:
        if len(self.buckets) < POINTS:
            return
        for left, right in zip(self.buckets[::2], self.buckets[1::2], strict=True):
            left.take(right)
        del self.buckets[1::2]
        self.width *= 2

    @property
    def steps(self) -> int:
        """Number of steps."""
        return sum(bucket.steps for bucket in self.buckets)

    @property
    def skipped(self) -> int:
        """Number of skipped steps."""
        return sum(bucket.skipped for bucket in self.buckets)

    def losses(self) -> list[tuple[float, float]]:
        """Mean loss by step."""
        return self._points((b.step, b.loss / b.losses if b.losses else math.nan) for b in self.buckets)

    def grads(self) -> list[tuple[float, float]]:
        """Root mean square of the projected gradient by step."""
        return self._points((b.step, math.sqrt(b.squares / b.grads) if b.grads else math.nan) for b in self.buckets)

    def lrs(self) -> list[tuple[float, float]]:
        """Learning rate by step."""
        return self._points((b.step, b.lr) for b in self.buckets)

    def memory(self) -> list[tuple[float, float]]:
        """Memory in MiB by step."""
        return self._points((b.step, b.memory / 2**20) for b in self.buckets)

    @staticmethod
    def _points(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(x, y) for x, y in points if math.isfinite(y)]


class Clock:
    """Host time of the parts of steps. On a GPU work is queued, and its time is that of the part that waits for it.

    Attributes:
        seconds: by part: "forwards" and "updates".
        forwards: number of losses that were measured: one for each point and micro-batch.
        began, ended: when the first part began and the last one ended; None before the first one.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {"forwards": 0.0, "updates": 0.0}
        self.forwards = 0
        self.began: float | None = None
        self.ended = 0.0

    @contextmanager
    def timed(self, part: str, forwards: int = 0) -> Iterator[None]:
        """A context whose time counts for a part."""
        begin = time.perf_counter()
        self.began = begin if self.began is None else self.began
        try:
            yield
        finally:
            self.ended = time.perf_counter()
            self.seconds[part] += self.ended - begin
            self.forwards += forwards

    @property
    def total(self) -> float:
        """Seconds from the first to the last part, with what was between them."""
        return 0.0 if self.began is None else self.ended - self.began


def memory_now(device: torch.device) -> float:
    """Bytes of tensors on a CUDA device, else of the process in memory; NaN where that is not known."""
    if device.type == "cuda":
        return float(torch.cuda.memory_allocated(device))
    try:
        with open("/proc/self/statm", "rb") as file:
            return float(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    except OSError:
        return math.nan
