"""The seed log of one `fit`: its place, and the step from which a resumed run continues."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from fsspec.utils import get_protocol
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from zo_core import SeedLog, ZeroOrder
from zo_core.seedlog import FILE_NAME, RunLog, Start

logger = logging.getLogger("lightning_zo")

#: The type of the strategy's ``log``: whether to write a log, or its path.
Where = bool | str | os.PathLike[str]


class Journal(RunLog):
    """Decides from ``ckpt_path`` what happens with the log.

    * None: a new log begins, and an old one is kept under another name.
    * "last", or the newest checkpoint in the log: the log is continued. The run repeats its steps after the
      checkpoint, or all of its steps if there is no checkpoint yet.
    * an older checkpoint: the run continues from exactly there; the log loses the later steps, and
      the whole log is kept under another name.

    A log of another run never stops this one: a warning gives the reason, and a new log begins.

    Args:
        trainer: trainer of the run, which has already chosen its checkpoint.
        path: path of the log.
        asked: the argument ``ckpt_path`` of `fit`.

    Attributes:
        measures_again: whether repeated steps run their forwards, because a callback or scheduler monitors
            a value that ``training_step`` logs; None until that is known.
    """

    def __init__(self, trainer: Trainer, path: Path, asked: Any):
        super().__init__(path, strict=False)
        self.asked, self.checkpoint = asked, trainer.ckpt_path
        self.watched = _watched(trainer)
        self.measures_again: bool | None = None if self.watched else False
        self._begun_once = False

    def start(self, engine: ZeroOrder) -> Start:
        """Decides as the class describes; a log opened again during a run is of other tensors, so it is a new one."""
        resumes = (self.asked == "last" or self.checkpoint is not None) and not self._begun_once
        self._begun_once = True
        source = self._source() if resumes else None
        if source is None:
            return "attach"
        log = SeedLog.read(source)
        if source != self.path:
            self.adopt(source)
        if self.checkpoint is None and engine.step_count > log.first_step:
            return "attach"  # an interrupted run continues in one process, without a checkpoint: its optimizer is new
        newest = max(log.parsed.checkpoints, default=log.first_step)
        return "branch" if self.asked != "last" and engine.step_count < newest else "follow"

    def _source(self) -> Path | None:
        """Finds the log to continue, first next to the checkpoint: an earlier run may have had another folder."""
        beside = [] if self.checkpoint is None else [Path(self.checkpoint).parent / self.path.name]
        return next((path.absolute() for path in (*beside, self.path) if path.exists()), None)

    def saw(self, names: set[str]) -> None:
        """Decides from the names that ``training_step`` logs whether repeated steps must log them, too."""
        forms = {f"{name}{end}" for name in names for end in ("", "_step", "_epoch")}
        self.measures_again = bool(self.measures_again or self.watched & forms)


def log_path(trainer: Trainer, where: Where) -> Path | None:
    """Returns the file of a run's log: ``where``, or one next to its checkpoints; None if the run has no log."""
    if where is False or trainer.fast_dev_run or trainer.barebones:  # type: ignore[attr-defined]
        return None
    if where is not True:
        path = Path(where)
        return (path / FILE_NAME if path.is_dir() else path).absolute()
    callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    folders = [callback.dirpath for callback in callbacks]
    local = [f for f in (*folders, trainer.log_dir, trainer.default_root_dir) if f and get_protocol(str(f)) == "file"]
    if not local:
        logger.warning(
            "no seed log is written, because checkpoints and logs of this run go to another machine, where nothing can "
            "be appended; ZOStrategy(log='some/folder/%s') writes it on this one",
            FILE_NAME,
        )
        return None
    return (Path(str(local[0]).removeprefix("file://")) / FILE_NAME).absolute()


def _watched(trainer: Any) -> set[str]:
    """Returns the names of the values that callbacks and schedulers monitor."""
    callbacks = {str(callback.monitor) for callback in trainer.callbacks if getattr(callback, "monitor", None)}
    schedulers = {str(config.monitor) for config in trainer.lr_scheduler_configs if config.reduce_on_plateau}
    return callbacks | schedulers
