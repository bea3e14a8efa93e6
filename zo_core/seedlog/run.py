"""The seed log of one run of a trainer, from its first step to its end."""

from __future__ import annotations

import logging
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import StateError
from ..files import replacing
from .format import LoggedStep
from .log import set_aside
from .stopped import Stopped
from .writer import SeedLogWriter

if TYPE_CHECKING:
    from ..engine import ZeroOrder

logger = logging.getLogger(__name__)

#: How a run begins: with a new log, with the log's steps up to a checkpoint, or with all of its steps.
Start = Literal["attach", "branch", "follow"]


class RunLog:
    """The seed log of one run of a trainer: it is opened at the first step, and closed at the end.

    An adapter derives from it, and says in `start` what happens with a log that is there.

    Args:
        path: of the log.
        strict: whether a log that is not of this run is an error. If not, a warning says why, and a new log begins.

    Attributes:
        path: of the log.
        log: the writer; None before the first step and after the end.
        stopped: where the run was interrupted, if it was.
    """

    def __init__(self, path: Path, *, strict: bool):
        self.path, self.strict = path, strict
        self.log: SeedLogWriter | None = None
        self.stopped: Stopped | None = None
        self._held: Stopped | None = None

    def start(self, engine: ZeroOrder) -> Start:
        """How the run begins.

        * "attach": a new log begins, and an old one is kept under another name.
        * "branch": the log goes on from the engine's step. It loses the steps beyond, and its whole is kept
          under another name.
        * "follow": the log goes on, and the steps that it has beyond the engine's are repeated.

        Args:
            engine: about to do its first step.

        Raises:
            StateError: the log that is there cannot be read.
        """
        raise NotImplementedError

    def open(self, engine: ZeroOrder) -> SeedLogWriter:
        """The log, which is begun or continued at the first step.

        Raises:
            StateError: the log that is there is not of this run, and the run is strict.
        """
        if self.log is None:
            try:
                self.log = self._begun(engine, self.start(engine))
            except StateError as error:
                if self.strict:
                    raise
                logger.warning("%s. It is kept aside, and a new log begins at step %d", error, engine.step_count)
                self.log = self._begun(engine, "attach")
        return self.log

    def _begun(self, engine: ZeroOrder, start: Start) -> SeedLogWriter:
        if start == "branch":
            return SeedLogWriter.branch(engine, self.path)
        if start == "follow":
            held = self._held
            engine.continuity.ahead = held.step if held is not None and held.engine is engine else 0
        return SeedLogWriter.attach(engine, self.path, follow=start == "follow")

    def logged(self, engine: ZeroOrder) -> LoggedStep | None:
        """The engine's next step as the log has it; None if it is yet to be measured.

        Raises:
            StateError: the log is not of this run, and the run is strict.
        """
        log = self.open(engine)
        try:
            entry = log.logged()
        except StateError as error:
            if self.strict:
                raise
            logger.warning("%s. The whole log is kept aside, and this run is measured from here on", error)
            self._again(engine, "branch")
            return None
        if entry is None and engine.step_count < log.next_step:  # a callback has gone back, to try learning rates
            self._again(engine, "attach")
        return entry

    def _again(self, engine: ZeroOrder, start: Start) -> None:
        self.end()
        self.log = self._begun(engine, start)

    def watching(self) -> AbstractContextManager[None]:
        """Around the measurement of a step that is not in the log."""
        assert self.log is not None, "logged() comes first"
        return self.log.watching()

    def adopt(self, source: Path) -> None:
        """Begins with a copy of another log; one that is at the path is kept under another name."""
        set_aside(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as fresh:
            shutil.copyfile(source, fresh)

    def sync(self) -> None:
        """Waits until the log is on the disk."""
        if self.log is not None:
            self.log.sync()

    def note_checkpoint(self, step: int) -> None:
        """Notes a checkpoint of the weights at ``step``, and waits until the log is on the disk."""
        if self.log is not None:
            self.log.checkpoint(step)

    def end(self) -> None:
        """Closes the log; `open` would begin again."""
        if self.log is not None:
            self.log.close()
            self.log = None

    # A run that goes on in the same process

    def stop(self, *, interrupted: bool) -> None:
        """The end of a run, after which another one may `take_up` what is in memory.

        Args:
            interrupted: whether it came before the last step. The weights are then read once.
        """
        try:
            if self.log is not None:
                self.stopped = Stopped.of(self.log) if interrupted else None
        finally:  # after an interrupt of this as well the model has to be loaded again
            self.end()

    def take_up(self, before: RunLog) -> None:
        """Goes on where another run with this log was interrupted, if its weights are still in memory.

        Repeating the steps that they have been moved by does not move them again.
        """
        if before.stopped is not None and before.stopped.still(self.path):
            self._held = self.stopped = before.stopped
            before.stopped.engine.continuity.ahead = before.stopped.step
