"""The seed log of one `train()`: where it is, and what a run that is resumed takes up."""

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

from zo_core import SeedLog, SeedLogWriter, StateError, ZeroOrder
from zo_core.seedlog import FILE_NAME


class Journal:
    """Decides from ``resume_from_checkpoint`` what happens with the log in the output folder.

    * None: a new log begins, and an old one is kept under another name.
    * True: the log goes on. The run starts from the newest checkpoint that was written completely, or
      without any from the model as it is, and repeats the steps that the log has beyond it.
    * the path of a checkpoint: the run goes on from exactly there; the log loses the steps beyond it,
      and its whole is kept under another name.

    Args:
        folder: the output folder.
        resume: what `train()` was given.

    Attributes:
        path: of the log.
        checkpoint: what `Trainer.train` is to be given.

    Raises:
        StateError: with True, the log cannot be read, or begins at a checkpoint that is gone.
    """

    def __init__(self, folder: str, resume: str | bool | None):
        self.path = Path(folder) / FILE_NAME
        self.resume = resume
        self.log: SeedLogWriter | None = None
        self.checkpoint: str | bool | None = resume
        self.follows = resume is True and self.path.exists()
        if self.follows:
            self.checkpoint = self._last_checkpoint()

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

    def open(self, engine: ZeroOrder) -> SeedLogWriter:
        """The log, which is begun or gone on with at the first step of the run."""
        if self.log is None:
            if self.follows:
                self.log = SeedLogWriter.attach(engine, self.path, follow=True)
            elif self.resume:
                self.log = SeedLogWriter.branch(engine, self.path)
            else:
                self.log = SeedLogWriter.attach(engine, self.path)
        return self.log

    def begin_checkpoint(self, step: int) -> None:
        """The log is on the disk before the checkpoint, and a checkpoint that it overwrites is complete no more."""
        if self.log is not None:
            (self._folder(step) / TRAINER_STATE_NAME).unlink(missing_ok=True)
            self.log.checkpoint(step)

    def end(self) -> None:
        """Closes the log; `open` would begin again."""
        if self.log is not None:
            self.log.close()
            self.log = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.end()


def _is_complete(folder: Path) -> bool:
    """Whether a run can go on from a checkpoint: it has the optimizer, and its last file, the trainer's state."""
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_bytes())
    except (OSError, ValueError):
        return False
    return (folder / OPTIMIZER_NAME).exists()


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """A pre-empted run ends like one that is interrupted: the log is closed, then the process exits.

    Nothing changes where somebody else handles the signal.
    """
    default = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not default or threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def leave(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a data loader's worker has inherited this
            os._exit(128 + number)
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
