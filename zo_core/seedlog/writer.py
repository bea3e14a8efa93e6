"""Writes a seed log during training.

    zo = ZeroOrder(model, lr=1e-6)
    log = SeedLogWriter.attach(zo, "run/seedlog.zo")      # from here on every step is in the file

A trainer that continues a run calls `attach` with ``follow=True``, and `SeedLogWriter.logged` before each
step: as long as this returns a step, the trainer repeats it from the log instead of measuring it.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import StateError
from ..files import write_whole
from ..modes import rng_state, same_rng
from ..records import StepRecord
from ..rules import RULES
from .format import LoggedStep, Parsed, encode_change, encode_header, encode_step
from .header import check_continued, current, make_header, updates
from .log import SeedLog, set_aside

if TYPE_CHECKING:
    from ..engine import ZeroOrder

logger = logging.getLogger(__name__)


class SeedLogWriter:
    """Appends every step of an engine to a file; `attach` and `branch` create it.

    A step is passed to the operating system as soon as its coefficients are known, so it survives a crash
    of the process; after `sync` it also survives a crash of the machine.

    Attributes:
        path: path of the file.
        next_step: the first step that is not in the file.
    """

    def __init__(self, engine: ZeroOrder, path: Path, parsed: Parsed):
        self.engine, self.path = engine, path
        self.next_step, self.chain = parsed.next_step, parsed.chain
        self.settings, self.rule, self.draws = parsed.settings, parsed.rule, parsed.draws
        self.num_probes = parsed.num_probes
        self._logged = {entry.step: entry for entry in parsed.steps if entry.step >= engine.step_count}
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)
        self._drew = False
        #: State of the generators before the first measurement of the step.
        self._start: dict[str, Any] = {}
        engine.braking.logged_from = parsed.header["first_step"]
        engine.listeners.append(self._on_step)
        engine.followers.append(self._begin_again)

    def _begin_again(self) -> None:
        """Begins a new log, because other weights move from now on; the old log is kept under another name."""
        self.sync()
        os.close(self._file)
        set_aside(self.path)
        write_whole(self.path, encode_header(make_header(self.engine)))
        parsed = SeedLog.read(self.path).parsed
        self.next_step, self.chain, self._logged = parsed.next_step, parsed.chain, {}
        self.settings, self.rule, self.draws = parsed.settings, parsed.rule, parsed.draws
        self.num_probes = parsed.num_probes
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        self.engine.braking.logged_from = parsed.header["first_step"]

    @classmethod
    def attach(cls, engine: ZeroOrder, path: str | os.PathLike[str], *, follow: bool = False) -> SeedLogWriter:
        """Starts logging at the engine's next step.

        Args:
            engine: the engine, with its weights and optimizer state from before that step.
            path: path of the file; its folder is created if it does not exist.
            follow: continue the existing log, which must have all steps before this one; `logged`
                then returns its later steps. An engine without its own seed takes the log's.
                Without ``follow`` a new log begins, and an existing one is kept under another name.

        Raises:
            StateError: the engine has ``backprop``; or, with ``follow``, the log cannot be continued by it, or its
                settings differ.
        """
        if engine.backprop is not None:
            raise StateError(
                "a run with backprop has no seed log: a step also moves weights by a gradient, which no seed gives "
                "back; save checkpoints, from which a run continues bit for bit"
            )
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if follow:
            return cls(engine, path, _continued(engine, path))
        set_aside(path)
        header = make_header(engine)
        for note in (*header["limits"], *header["notes"]):
            logger.warning("seed log: %s", note)
        write_whole(path, encode_header(header))
        return cls(engine, path, SeedLog.read(path).parsed)

    @classmethod
    def branch(cls, engine: ZeroOrder, path: str | os.PathLike[str]) -> SeedLogWriter:
        """Starts logging at a checkpoint: the log that has the steps up to it continues without the later ones.

        The whole log is kept under another name. If it does not lead to the checkpoint, a new log begins.
        """
        path = Path(path)
        try:
            log = SeedLog.read(path)
            log.since(engine.step_count)
            check_continued(engine, log)
        except StateError:
            return cls.attach(engine, path)
        if log.next_step > engine.step_count:
            kept = log.upto(engine.step_count)
            set_aside(path)
            write_whole(path, kept)
        return cls.attach(engine, path, follow=True)

    @property
    def later(self) -> dict[int, LoggedStep]:
        """The steps of the log from the engine's next one on, by their index."""
        return dict(self._logged)

    def logged(self) -> LoggedStep | None:
        """Returns the engine's next step from the log; None if the step must be measured.

        If the logged run was closed before that step, low-rank windows also end here.

        Raises:
            StateError: the run's learning rate, weight decay, eps, seed, rule or groups differ from the log.
        """
        entry = self._logged.get(self.engine.step_count)
        if entry is not None:
            mine = updates(*current(self.engine), RULES.describe(self.engine.rule))
            logged = updates(entry.settings, entry.lrs, entry.rule)
            names = [name for name, value in mine.items() if value != logged[name]]
            if names:
                said = self.engine.continuity.front.said
                raise StateError(
                    f"{self.path} has step {entry.step} with {said({name: logged[name] for name in names})}, and this "
                    f"run has {said({name: mine[name] for name in names})}; continue with the arguments of that run, "
                    "or start from a checkpoint by its name, which leaves the rest of the log aside"
                )
            if entry.merged and entry.step >= self.engine.continuity.ahead:
                self.engine.updaters.settle()
        return entry

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A context for a measurement: records whether it draws from the global random generators."""
        before = rng_state()
        self._start = self._start or before
        yield
        self._drew = self._drew or not same_rng(before, rng_state())

    def _on_step(self, record: StepRecord) -> None:
        coefficients = tuple(probe.coefficient for probe in record.probes)
        if record.step < self.next_step:
            entry = self._logged.pop(record.step, None)
            if entry is None or (entry.coefficients, entry.rollback) != (coefficients, record.rollback):
                then = "before this log was opened" if entry is None else f"with the coefficients {entry.coefficients}"
                back = "" if entry is None or entry.rollback is None else f" and {entry.rollback}"
                raise StateError(
                    f"{self.path} has step {record.step} {then}{back}, and now it was done with {coefficients}; "
                    "a run that goes back needs a new log"
                )
            return
        settings, lrs = current(self.engine, self.settings.columns)
        changes: dict[str, Any] = {}
        if settings != self.settings:
            changes["settings"] = settings.to_dict()
        rule = RULES.describe(self.engine.rule)
        if rule != self.rule:
            changes["rule"] = rule
        if self.engine.num_probes != self.num_probes:
            changes["num_probes"] = self.engine.num_probes
            logger.warning(
                "from step %d on a step has %d directions instead of %d: the run continues with another number of "
                "processes",
                *(record.step, self.engine.num_probes, self.num_probes),
            )
        # The generators of a step whose query failed went back; those of one that was left out did not.
        drew = self._drew and not (record.failed and same_rng(self._start, rng_state()))
        if drew != self.draws:
            changes["draws"] = drew
        if self.engine.merged:
            changes["merged"] = True
        if record.step != self.next_step:
            changes["next_step"] = record.step
        if record.rollback is not None:
            changes["rollback"] = asdict(record.rollback)
        if record.failed:
            changes["failed"] = True
        if changes:
            self.note(changes)
        self.settings, self.rule, self.draws = settings, rule, drew
        self._drew, self._start = False, {}
        self.num_probes = self.engine.num_probes
        width = 1 + max(settings.columns)
        columns = [lrs[settings.columns.index(column)] for column in range(width)]
        if record.normaliser is not None:
            columns.append(record.normaliser)
        if self.engine.scored:
            columns += [math.nan] * 4 if record.scores is None else astuple(record.scores)
        padded = coefficients or (float("nan"),) * self.engine.num_probes
        self._append(encode_step(record.step, padded, record.loss, columns, self.chain))
        self.next_step = record.step + 1

    def note(self, change: dict[str, Any]) -> None:
        """Appends a change-record."""
        self._append(encode_change(change, self.chain))

    def checkpoint(self, step: int) -> None:
        """Records that a checkpoint of the weights at ``step`` is about to be written, and syncs."""
        self.note({"checkpoint": step})
        self.sync()

    def _append(self, record: bytes) -> None:
        size = os.fstat(self._file).st_size
        try:
            whole = os.write(self._file, record) == len(record)
            reason = "the disk is full"
        except OSError as error:
            whole, reason = False, error.strerror or str(error)
        if not whole:
            os.truncate(self.path, size)
            raise StateError(
                f"the seed log {self.path} could not be written ({reason}) and ends before this step; free some space "
                "and resume, or train without a log"
            )
        self.chain = int.from_bytes(record[-4:], "little")

    def sync(self) -> None:
        """Waits until the file is on the disk."""
        os.fsync(self._file)

    def close(self) -> None:
        """Syncs and stops logging. Calling it again does nothing."""
        if self._on_step in self.engine.listeners:
            self.engine.listeners.remove(self._on_step)
            self.engine.followers.remove(self._begin_again)
            self.sync()
            os.close(self._file)


def _continued(engine: ZeroOrder, path: Path) -> Parsed:
    """Returns the log at ``path`` without a torn tail, after checking that it is of this run."""
    log = SeedLog.read(path)
    check_continued(engine, log)
    parsed = log.parsed
    if parsed.corrupt is None or not parsed.followed:
        damaged = path.stat().st_size - parsed.end
        if damaged:
            logger.warning("%s ends in %d bytes of a record that was not finished; they are dropped", path, damaged)
            os.truncate(path, parsed.end)
        parsed.corrupt = None
        if (
            parsed.rollback is not None or parsed.failed
        ):  # the run was killed before the step itself, which will do it again
            os.truncate(path, parsed.pending)
            parsed = SeedLog.read(path).parsed
    log = SeedLog(path, parsed)
    log.corrupt = parsed.corrupt
    log.since(engine.step_count)
    return parsed
