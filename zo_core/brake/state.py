"""The brake of an engine: what it has seen, what it does about it, and the updates that it can revert."""

from __future__ import annotations

import logging
import math
import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from ..records import Probe
from ..rules import RULES, UpdateRule
from .statistic import Alarm, Brake, in_float32
from .trust import TooLong, Trust

logger = logging.getLogger(__name__)

#: Number of updates that are kept, and their size in bytes, where they have many directions; the brake does not go back
#: further.
KEPT = 20_000
KEPT_BYTES = 16 << 20
#: Updates are kept for as long as weight decay has left more than 1/256 of the weights since then, and half of 16-bit
#: ones. Going back divides by that share, and the rounding errors of all steps grow with it.
SHRUNK, SHRUNK_16 = math.log(256.0), math.log(2.0)
#: Number of steps without any difference between the losses of their probes after which there is a warning.
AGREEING = 32


@dataclass(frozen=True)
class Done:
    """A step that moved weights, with everything needed to revert it; the tuples have one value per parameter group.

    Attributes:
        step: index of the step.
        probes: its probes.
        lrs: the learning rates, as they were applied.
        eps: eps in units of the step's eps.
        weight_decay: the weight decays.
        rule: the update rule.
        normaliser: running mean and count of the step normaliser before the step; None without one.
    """

    step: int
    probes: tuple[Probe, ...]
    lrs: tuple[float, ...]
    eps: tuple[float, ...]
    weight_decay: tuple[float, ...]
    rule: UpdateRule
    normaliser: tuple[float, int] | None = None


@lru_cache(maxsize=64)
def _layout(probes: int, groups: int) -> struct.Struct:
    return struct.Struct(f"<qI{probes}f{3 * groups + 1}dq")


class History:
    """The latest updates, packed: some 50 bytes for a step with one direction and one group.

    Attributes:
        floor: the first step from which on all updates are known.
    """

    def __init__(self, floor: int = 0):
        self.forget(floor)

    def forget(self, floor: int) -> None:
        """Drops all updates; ``floor`` is the next step."""
        self.floor = floor
        self.sizes = (0, 0)
        self.packed: deque[bytes] = deque()
        #: Seed of the run and rule. A step has the number of its frame; ``first_frame`` is that of the first one here.
        self.frames: deque[tuple[int, UpdateRule]] = deque()
        self.first_frame = 0
        #: Minus the logarithm of what weight decay has left in these updates, at the largest rate of all groups.
        self.shrunk = 0.0

    def add(self, done: Done, seed: int, most: float = SHRUNK) -> None:
        """Adds an update.

        Args:
            done: the update.
            seed: the seed of the run.
            most: the largest `shrunk`; the oldest updates are dropped until it is met.
        """
        sizes = len(done.probes), len(done.lrs)
        if sizes != self.sizes:
            self.forget(done.step)
            self.sizes = sizes
        frame = seed, done.rule
        if not self.frames or self.frames[-1] != frame:
            self.frames.append(frame)
        coefficients = [probe.coefficient for probe in done.probes]
        values = *done.lrs, *done.eps, *done.weight_decay, *(done.normaliser or (0.0, -1))
        number = self.first_frame + len(self.frames) - 1
        self.packed.append(_layout(*sizes).pack(done.step, number, *coefficients, *values))
        self.shrunk += _shrinks(done.lrs, done.weight_decay)
        if len(self.packed) > max(1, min(KEPT, KEPT_BYTES // _layout(*sizes).size)):
            self.drop_before(_step(self.packed[1]))
        while self.packed and self.shrunk > most:
            self.drop_before(_step(self.packed[0]) + 1)

    def drop_before(self, step: int) -> None:
        """Drops the updates before a step."""
        while self.packed and _step(self.packed[0]) < step:
            self._less(self.packed.popleft())
        self.floor = max(self.floor, step)
        while self.packed and self.first_frame < int.from_bytes(self.packed[0][8:12], "little"):
            self.frames.popleft()
            self.first_frame += 1

    def pop(self, step: int, seed_of: Callable[[int, int, int], int]) -> list[Done]:
        """Removes the updates from a step on, and returns them, oldest first.

        Args:
            step: the first of them.
            seed_of: gives the seed of a direction from the seed of the run, the step and the direction.
        """
        probes, groups = self.sizes
        layout, found = _layout(probes, groups), []
        while self.packed and _step(self.packed[-1]) >= step:
            last = self.packed.pop()
            self._less(last)
            at, frame, *values, mean, count = layout.unpack(last)
            seed, rule = self.frames[frame - self.first_frame]
            directions = tuple(Probe(seed_of(seed, at, i), c) for i, c in enumerate(values[:probes]))
            lrs, eps, weight_decay = (tuple(values[probes + i * groups :][:groups]) for i in range(3))
            normaliser = (mean, count) if count >= 0 else None
            found.append(Done(at, directions, lrs, eps, weight_decay, rule, normaliser))
        return found[::-1]

    def _less(self, packed: bytes) -> None:
        """Takes what an update that is no longer here has shrunk out of `shrunk`."""
        probes, groups = self.sizes
        if not self.packed:
            self.shrunk = 0.0
        elif self.shrunk:
            values = _layout(probes, groups).unpack(packed)[2 + probes : -2]
            self.shrunk = max(0.0, self.shrunk - _shrinks(values[:groups], values[2 * groups :]))

    def saved(self) -> dict[str, Any]:
        """The updates as plain values; packed ones as a string, which every checkpoint can hold."""
        data = b"".join(self.packed).decode("latin-1")
        frames = [[seed, RULES.describe(rule)] for seed, rule in self.frames]
        first = {"floor": self.floor, "first_frame": self.first_frame, "shrunk": self.shrunk}
        return {**first, "sizes": list(self.sizes), "frames": frames, "packed": data}

    def load(self, saved: dict[str, Any]) -> None:
        """Restores what `saved` returned."""
        self.forget(saved["floor"])
        self.first_frame, self.sizes = saved["first_frame"], tuple(saved["sizes"])
        self.shrunk = saved.get("shrunk", 0.0)
        self.frames.extend((seed, RULES.resolve(rule)) for seed, rule in saved["frames"])
        data, size = saved["packed"].encode("latin-1"), _layout(*self.sizes).size
        self.packed.extend(data[at : at + size] for at in range(0, len(data), size))


def _step(packed: bytes) -> int:
    return int.from_bytes(packed[:8], "little")


def _shrinks(lrs: Sequence[float], weight_decays: Sequence[float]) -> float:
    """Minus the logarithm of what the weight decay of a step leaves; infinite if that is nothing."""
    most = max(lr * decay for lr, decay in zip(lrs, weight_decays, strict=True))
    return -math.log1p(-most) if most < 1.0 else math.inf


class Braking:
    """The brake of one engine.

    Args:
        mode: "rollback", "warn" or None, as the setting ``brake``.

    Attributes:
        brake: the test for losses that have risen.
        trust: the test for steps that are too long for the noise.
        history: the updates since the best block, if the brake may have to revert them.
        next_step: the step that `see` expects; None before the first one.
        normaliser: state of the step normaliser before the step in progress, as in `Done`.
        returned: whether the statistics began again with the weights of the best block, and have raised no alarm since.
        logged_from: first step of the seed log; updates before it are not reverted, as a replay could not do so.
    """

    def __init__(self, mode: str | None):
        self.mode = mode
        self.logged_from = 0
        self.alarms = self.agreeing = 0
        self.reset()

    def reset(self) -> None:
        """Forgets everything; the next step begins the statistics."""
        self.next_step: int | None = None
        self.normaliser: tuple[float, int] | None = None
        self.brake, self.trust, self.history = Brake(), Trust(), History()
        self.returned = False

    def see(self, step: int, loss: float | None) -> Alarm | None:
        """Takes the loss of a step; returns an alarm if it has risen, or has fallen by less than it should have.

        A step whose query failed has no loss (None), and changes nothing.

        Every step of a run comes here once, repeated and skipped ones included, so that a resumed run has the
        statistics of the run that it continues. After a jump in the steps they begin anew.
        """
        if step != self.next_step:
            self.brake, self.trust, self.history = Brake(step), Trust(), History(step)
            self.returned = False
        self.next_step = step + 1
        if self.mode is None or loss is None:
            return None
        logged = in_float32(loss)
        alarm = self.brake.see(step, logged) or self.trust.see(step, logged, self._best(step))
        if alarm is not None and self.returned and alarm.at_once:
            self.brake, self.trust, self.returned = Brake(step + 1), Trust(), False
            return replace(alarm, anew=True)
        if alarm is None:
            self.history.drop_before(self.brake.earliest() if self.brake.learnt else self.brake.start)
        else:
            self.restart(step + 1)
        return alarm

    def _best(self, step: int) -> int:
        """The first step with the best weights, for steps that are too long for the noise.

        The lowest of many noisy means is low by chance, so the best block counts once the loss has clearly fallen, and
        until then the beginning does.
        """
        block = self.brake.goal()
        if block is None:
            return step
        return block.middle if self.brake.learnt else self.brake.start

    def learnt(self) -> int:
        """The first step with the weights of the best block, if the loss has clearly fallen, else that of the run."""
        block = self.brake.goal()
        return block.middle if block is not None and self.brake.learnt else 0

    def restart(self, step: int) -> None:
        """Begins the tests again at a step, after an alarm; the best blocks are kept."""
        self.brake.restart(step)
        self.trust.restart()
        self.returned = False

    def goal(self, alarm: Alarm) -> int:
        """The step to go back to, given an alarm."""
        return max(alarm.step, self.history.floor, self.logged_from)

    def share(self, alarm: Alarm) -> float:
        """What learning rates are multiplied by, given an alarm.

        Steps with which nothing was learnt are likely to be much too long for the noise.
        """
        return 0.25 if isinstance(alarm, TooLong) and alarm.step == self.brake.start else 0.5

    def noted(self, losses: Sequence[float]) -> None:
        """Warns if the losses of all probes have agreed for many steps; takes the losses of a step."""
        agree = len(losses) > 1 and math.isfinite(losses[0]) and len(set(losses)) == 1
        self.agreeing = self.agreeing + 1 if agree and self.mode is not None else 0
        if self.agreeing >= AGREEING and self.agreeing & (self.agreeing - 1) == 0:
            logger.warning(
                "the losses of all probes have agreed exactly for %d steps (%.7g in the last one): no direction "
                "changes the loss, so nothing is learnt. Either the model has collapsed or is saturated (begin again "
                "with a lower rate), or the loss does not depend on the weights that move",
                self.agreeing,
                losses[0],
            )

    def warn(self, step: int, alarm: Alarm, advice: str) -> None:
        """Warns of a rise that is left alone: of the first one, the second, the fourth, ..."""
        self.alarms += 1
        if self.alarms & (self.alarms - 1) == 0:
            often = f" (alarm number {self.alarms} of this run)" if self.alarms > 1 else ""
            logger.warning("%s%s; %s", alarm.said(step), often, advice)

    # Checkpoints

    def saved(self) -> dict[str, Any]:
        """The state, as plain values; empty before the first step."""
        if self.next_step is None:
            return {}
        tests = {"brake": self.brake.saved(), "trust": self.trust.saved()}
        returned = {"returned": True} if self.returned else {}
        return {"next_step": self.next_step, **tests, "history": self.history.saved(), **returned}

    def load(self, saved: dict[str, Any]) -> None:
        """Restores what `saved` returned."""
        self.reset()
        if saved:
            self.next_step = saved["next_step"]
            self.brake.load(saved["brake"])
            self.trust.load(saved.get("trust", {}))
            self.history.load(saved["history"])
            self.returned = saved.get("returned", False)
