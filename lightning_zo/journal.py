"""The seed log of one `fit`: where it is, and from where a resumed run continues."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fsspec.utils import get_protocol
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from zo_core import SeedLog, ZeroOrder
from zo_core.seedlog import FILE_NAME, RunLog, Start

logger = logging.getLogger("lightning_zo")

#: What a user may ask for: yes or no, or where.
Where = bool | str | os.PathLike[str]


class Asked:
    """A launcher that launches nothing, but records the arguments of `fit`: if there is no checkpoint yet, later code
    gets None for "last".
    """

    is_interactive_compatible = True

    def __init__(self) -> None:
        self.ckpt_path: Any = None

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        self.ckpt_path = inspect.signature(function).bind(*args, **kwargs).arguments.get("ckpt_path")
        return function(*args, **kwargs)

    def kill(self, signum: int) -> None:
        """Does nothing: there are no other processes."""


class Journal(RunLog):
    """Decides from ``ckpt_path`` what happens with the log.

    * None: a new log begins, and an old one is kept under another name.
    * "last", or the newest checkpoint that the log knows: the log is continued. The run repeats the steps that
      it has beyond the checkpoint, or all if there is no checkpoint yet.
    * an older checkpoint: the run continues from exactly there; the log loses the later steps, and
      the whole log is kept under another name.

    A log that is not of this run never stops it: a warning says why, and a new one begins.

    Args:
        trainer: of the run; its checkpoint has been chosen.
        path: of the log.
        asked: what `fit` was given as ``ckpt_path``.

    Attributes:
        measures_again: whether repeated steps run their forwards, because something watches what
            ``training_step`` logs; None until that is known.
    """

    def __init__(self, trainer: Trainer, path: Path, asked: Any):
        super().__init__(path, strict=False)
        self.asked, self.checkpoint = asked, trainer.ckpt_path
        self.watched = _watched(trainer)
        self.measures_again: bool | None = None if self.watched else False
        self._begun_once = False

    def start(self, engine: ZeroOrder) -> Start:
        """As the class says; a log that is opened again in mid-run is of other tensors, and a new one."""
        resumes = (self.asked == "last" or self.checkpoint is not None) and not self._begun_once
        self._begun_once = True
        source = self._source() if resumes else None
        if source is None:
            return "attach"
        log = SeedLog.read(source)
        if source != self.path:
            self.adopt(source)
        if self.checkpoint is None and engine.step_count > log.first_step:
            return "attach"  # an interrupted run goes on in one process, without a checkpoint: its optimizer is new
        newest = max(log.parsed.checkpoints, default=log.first_step)
        return "branch" if self.asked != "last" and engine.step_count < newest else "follow"

    def _source(self) -> Path | None:
        """The log to continue: next to the checkpoint, where an earlier run may have had its own folder."""
        beside = [] if self.checkpoint is None else [Path(self.checkpoint).parent / self.path.name]
        return next((path.absolute() for path in (*beside, self.path) if path.exists()), None)

    def saw(self, names: set[str]) -> None:
        """Learns what ``training_step`` logs: whether repeated steps have to log it, too."""
        forms = {f"{name}{end}" for name in names for end in ("", "_step", "_epoch")}
        self.measures_again = bool(self.measures_again or self.watched & forms)


def log_path(trainer: Trainer, where: Where) -> Path | None:
    """The file of a run's log: ``where``, or next to its checkpoints; None if it has none."""
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
            "no seed log is written, because checkpoints and logs of this run go to another machine and a log is "
            "appended to; ZOStrategy(log='some/folder/%s') puts it on this one",
            FILE_NAME,
        )
        return None
    return (Path(str(local[0]).removeprefix("file://")) / FILE_NAME).absolute()


def _watched(trainer: Any) -> set[str]:
    """Names of values that callbacks and schedulers decide by."""
    callbacks = {str(callback.monitor) for callback in trainer.callbacks if getattr(callback, "monitor", None)}
    schedulers = {str(config.monitor) for config in trainer.lr_scheduler_configs if config.reduce_on_plateau}
    return callbacks | schedulers
