"""The seed log of one run of a trainer, from the run's first step to its end."""

from __future__ import annotations

import logging
import math
import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..agreement import agree
from ..config import ZOConfig
from ..errors import StateError
from ..files import replacing
from ..summary import Summary
from .format import LoggedStep
from .log import SeedLog, set_aside
from .stopped import Stopped
from .writer import SeedLogWriter

if TYPE_CHECKING:
    from ..engine import ZeroOrder

logger = logging.getLogger(__name__)

#: How a run begins: with a new log, with the log's steps up to a checkpoint, or with all of the log's steps.
Start = Literal["attach", "branch", "follow"]


def can_log(config: ZOConfig) -> bool:
    """Whether the runs of a trainer with this configuration can have a log; says so if not."""
    if config.backprop is not None:
        logger.warning(
            "this run has no seed log, because seeds do not give back the gradients of backprop; it resumes from its "
            "checkpoints"
        )
    return config.backprop is None


class RunLog:
    """The seed log of one run of a trainer: it is opened at the first step, and closed at the end.

    An adapter derives from it, and decides in `start` what happens with an existing log.

    Args:
        path: path of the log.
        strict: whether a log of another run is an error. If not, a warning gives the reason, and a new log begins.

    Attributes:
        path: path of the log.
        log: the writer; None before the first step and after the end.
        summary: the run's summary, which is told the losses of the log's steps before the first one of the run.
        stopped: the state at which the run was interrupted; None if it was not.
    """

    def __init__(self, path: Path, *, strict: bool):
        self.path, self.strict = path, strict
        self.log: SeedLogWriter | None = None
        self.summary = Summary()
        self.stopped: Stopped | None = None
        self._held: Stopped | None = None
        self._received: dict[int, LoggedStep] | None = None
        self._beside: ZeroOrder | None = None

    def start(self, engine: ZeroOrder) -> Start:
        """Decides how the run begins.

        * "attach": a new log begins, and an old one is kept under another name.
        * "branch": the log continues from the engine's step and loses the later steps; the whole log is kept
          under another name.
        * "follow": the log continues, and its steps from the engine's step on are repeated.

        Args:
            engine: the engine before its first step.

        Raises:
            StateError: the existing log cannot be read.
        """
        raise NotImplementedError

    def open(self, engine: ZeroOrder) -> SeedLogWriter:
        """Returns the log's writer; the first call begins or continues the log.

        Raises:
            StateError: the existing log is of another run, and this run is strict.
        """
        if self.log is None:
            try:
                self.log = self._begun(engine, self.start(engine))
            except StateError as error:
                if self.strict:
                    raise
                logger.warning("%s. It is kept aside, and a new log begins at step %d", error, engine.step_count)
                self.log = self._begun(engine, "attach")
            earlier = [entry for entry in SeedLog.read(self.path).steps if entry.step < engine.step_count]
            self.summary.resume(entry.loss for entry in earlier)
            for entry in earlier:
                engine.curves.add(entry.step, entry.loss, _grad(engine, entry), entry.lrs[0], entry.why)
        return self.log

    def _begun(self, engine: ZeroOrder, start: Start) -> SeedLogWriter:
        if start == "branch":
            return SeedLogWriter.branch(engine, self.path)
        if start == "follow":
            self._take_weights_of(engine)
        return SeedLogWriter.attach(engine, self.path, follow=start == "follow")

    def _take_weights_of(self, engine: ZeroOrder) -> None:
        held = self._held
        engine.continuity.ahead = held.step if held is not None and held.engine is engine else 0
        if engine.continuity.ahead:  # it repeats the run from its beginning, when the brake had done nothing
            engine.braking.reset()
            engine.optimizer.factor = 1.0

    def logged(self, engine: ZeroOrder) -> LoggedStep | None:
        """Returns the engine's next step from the log; None if the step must be measured.

        Raises:
            StateError: the log is of another run, and this run is strict.
        """
        if engine.exchange.size > 1 and self._received is None:
            self._received = self._everywhere(engine)
        if engine.exchange.rank:
            assert self._received is not None
            entry = self._received.get(engine.step_count)
            if entry is not None and entry.merged and entry.step >= engine.continuity.ahead:
                engine.updaters.settle()  # as the writer of the log does
            return entry
        try:
            return self._logged(engine)
        except BaseException as error:
            engine.exchange.fail(error)
            raise

    def _everywhere(self, engine: ZeroOrder) -> dict[int, LoggedStep]:
        """The steps of the log from the engine's next one on, on every process; only rank 0 has the log.

        Raises:
            StateError: a run that was interrupted in these processes was not at the same step in all of them.
        """
        mine: dict[int, LoggedStep] = {}
        try:
            if not engine.exchange.rank:
                mine = self.open(engine).later
        except BaseException as error:
            engine.exchange.fail(error)
            raise
        if engine.exchange.rank:
            self._beside = engine
            self._take_weights_of(engine)
        found = engine.exchange.everywhere((mine, engine.continuity.ahead))
        ahead = [at for _, at in found]
        if len(set(ahead)) > 1:
            raise StateError(
                f"the processes were interrupted at the steps {ahead}, by rank; a run can only continue in them from "
                "the same step, so start them again: they then repeat the steps of the log"
            )
        if ahead[0]:
            agree(engine)
        return found[0][0]

    def _logged(self, engine: ZeroOrder) -> LoggedStep | None:
        log = self.open(engine)
        try:
            entry = log.logged()
        except StateError as error:
            if self.strict:
                raise
            logger.warning("%s. The whole log is kept aside, and this run is measured from here on", error)
            self._again(engine, "branch")
            return None
        if entry is None and engine.step_count < log.next_step:  # a callback went back, to try learning rates
            self._again(engine, "attach")
        return entry

    def _again(self, engine: ZeroOrder, start: Start) -> None:
        self.end()
        self.log = self._begun(engine, start)

    def watching(self) -> AbstractContextManager[None]:
        """Returns a context for measuring a step that is not in the log."""
        return nullcontext() if self.log is None else self.log.watching()

    def adopt(self, source: Path) -> None:
        """Starts from a copy of another log; an existing log at the path is kept under another name."""
        set_aside(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as fresh:
            shutil.copyfile(source, fresh)

    def sync(self) -> None:
        """Waits until the log is on the disk."""
        if self.log is not None:
            self.log.sync()

    def note_checkpoint(self, step: int) -> None:
        """Records a checkpoint of the weights at ``step``, and waits until the log is on the disk."""
        if self.log is not None:
            self.log.checkpoint(step)

    def end(self) -> None:
        """Closes the log; `open` would begin it again."""
        self._received = None
        if self.log is not None:
            self.log.close()
            self.log = None

    # A run that continues in the same process

    def stop(self, *, interrupted: bool) -> None:
        """Ends the run; another run in this process can then continue it with `take_up`.

        Args:
            interrupted: whether the run ends before its last step. All weights are then read once.
        """
        try:
            if self.log is not None:
                self.stopped = Stopped.of(self.log) if interrupted else None
            elif self._beside is not None and interrupted:
                self.stopped = Stopped.beside(self._beside, self.path)
        finally:  # if this is interrupted, too, the log is closed, and the model must be loaded again
            self.end()

    def take_up(self, before: RunLog) -> None:
        """Continues an interrupted run of this log, if its weights are still in memory.

        The weights already include the steps up to the interrupt; repeating these does not move them again.
        """
        if before.stopped is not None and before.stopped.still(self.path):
            self._held = self.stopped = before.stopped
            before.stopped.engine.continuity.ahead = before.stopped.step


def _grad(engine: ZeroOrder, entry: LoggedStep) -> float:
    """The projected gradient of a step, if its coefficients tell it: clipping is not undone."""
    if engine.estimator.name != "spsa" or entry.skipped:
        return math.nan
    return math.fsum(entry.coefficients) * (1.0 if entry.normaliser is None else math.sqrt(entry.normaliser))
