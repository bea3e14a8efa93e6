"""The seed log of one `train()`: its place, and the step from which a resumed run continues."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from zo_core import RanksError, SeedLog, StateError, ZeroOrder
from zo_core.modes import rng_state, set_rng_state
from zo_core.seedlog import FILE_NAME, RunLog, Start


class Journal(RunLog):
    """Decides from ``resume_from_checkpoint`` what happens with the log in the output folder.

    * None: a new log begins, and an old one is kept under another name.
    * True: the log is continued. The run starts from the newest complete checkpoint, or from the current
      model if there is none, and repeats the later steps of the log. After an interrupt in the same
      process the weights already include these steps, and repeating them does not move the weights.
    * the path of a checkpoint: the run continues from exactly there; the log loses the later steps,
      and the whole log is kept under another name.

    Args:
        folder: the output folder.
        resume: the argument of `train()`.
        before: the journal of the trainer's previous run.

    Attributes:
        checkpoint: the argument for `Trainer.train`.
        running: whether `train()` is running.
        evaluated: metrics of the run's evaluations in this process, by step and names of the metrics.

    Raises:
        StateError: with True, the log cannot be read, or it begins at a checkpoint that no longer exists.
    """

    def __init__(self, folder: str, resume: str | bool | None, before: Journal | None = None):
        super().__init__(Path(folder) / FILE_NAME, strict=True)
        self.resume = resume
        self.checkpoint: str | bool | None = resume
        self.follows = resume is True and self.path.exists()
        self.running = False
        self.evaluated: dict[tuple[int, frozenset[str]], dict[str, float]] = {}
        if self.follows:
            self.checkpoint = self._last_checkpoint()
            if before is not None and before.path == self.path:
                self._go_on(before)
        self._rng = rng_state()

    def _go_on(self, before: Journal) -> None:
        """Continues a run of this process: restores its random state, and keeps the weights if they are its last."""
        self.evaluated = before.evaluated
        set_rng_state(before._rng)
        if self.checkpoint is None:
            self.take_up(before)

    def start(self, engine: ZeroOrder) -> Start:
        """Decides as the class describes."""
        return "follow" if self.follows else "branch" if self.resume else "attach"

    def _last_checkpoint(self) -> str | None:
        log = SeedLog.read(self.path)
        for step in sorted({log.first_step, *log.parsed.checkpoints}, reverse=True):
            folder = self._folder(step)
            if _is_complete(folder):
                return str(folder)
        if log.first_step:
            raise StateError(
                f"the seed log {self.path} begins at step {log.first_step}, and the checkpoint it continued is not at "
                f"{self._folder(log.first_step)}; put it there, or name another checkpoint to resume from"
            )
        return None

    def _folder(self, step: int) -> Path:
        return self.path.parent / f"{PREFIX_CHECKPOINT_DIR}-{step}"

    def metrics(self, step: int, found: dict[str, float], *, behind: bool) -> dict[str, float]:
        """Returns the metrics of an evaluation at a step.

        Args:
            step: number of steps done.
            found: the metrics of the weights in memory.
            behind: whether these weights are of a later step; the metrics are then those of the first
                evaluation at ``step``.

        Raises:
            StateError: there was no such evaluation.
        """
        key = step, frozenset(found)
        if not behind:
            self.evaluated[key] = dict(found)
        elif key not in self.evaluated:
            raise StateError(
                f"step {step} is repeated and was not evaluated before the interrupt, and the weights of that step "
                "are gone; train without this evaluation, or resume in a new process"
            )
        return self.evaluated[key]

    def begin_checkpoint(self, step: int) -> None:
        """Syncs the log before a checkpoint is written; one that it overwrites no longer counts as complete."""
        if self.log is not None:
            (self._folder(step) / TRAINER_STATE_NAME).unlink(missing_ok=True)
            self.note_checkpoint(step)

    def __enter__(self) -> Journal:
        self.running = True
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: Any) -> None:
        self.running = False
        self.stop(interrupted=kind is not None and issubclass(kind, (KeyboardInterrupt, RanksError)))


def _is_complete(folder: Path) -> bool:
    """Whether a run can continue from a checkpoint: it has the optimizer and its last file, the trainer's state."""
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_bytes())
    except (OSError, ValueError):
        return False
    return (folder / OPTIMIZER_NAME).exists()


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Makes a pre-empted run end like an interrupted one: the log is closed, then the process exits.

    Does nothing if other code handles the signal.
    """
    default = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not default or threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def leave(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a data loader's worker has inherited this handler
            os._exit(128 + number)
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
