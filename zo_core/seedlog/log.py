"""Reading a seed log."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from ..errors import StateError
from .format import LoggedStep, Parsed, parse

logger = logging.getLogger(__name__)

#: Name of a log in the folder of a run.
FILE_NAME = "seedlog.zo"


class SeedLog:
    """The contents of a log file.

    Attributes:
        path: path of the file.
        header: format, versions, fingerprint of the base model, configuration.
        steps: one `LoggedStep` per step.
        first_step, next_step: the log has the steps ``first_step … next_step - 1``.
        torn: number of bytes of an incomplete last record, which are ignored.
        corrupt: what is wrong after the last good step, or None.
    """

    def __init__(self, path: str | os.PathLike[str], parsed: Parsed):
        self.path, self.parsed, self.header, self.steps = Path(path), parsed, parsed.header, tuple(parsed.steps)
        self.first_step: int = parsed.header["first_step"]
        self.next_step, self.torn, self.corrupt = parsed.next_step, parsed.torn, parsed.corrupt

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> SeedLog:
        """Reads a log, which may still be open for writing.

        Raises:
            StateError: the file does not exist, is not a log, or has a damaged header. A damaged
                record is no error here: the steps before it are read, and ``corrupt`` tells where it is.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise StateError(f"the seed log {path} cannot be read: {error.strerror}") from error
        return cls(path, parse(data, f"the seed log {path}"))

    def since(self, step: int) -> tuple[LoggedStep, ...]:
        """Returns the steps from ``step`` on, for weights that already have the earlier ones.

        Raises:
            StateError: the log begins later, ends earlier, or is corrupt.
        """
        if self.corrupt is not None:
            raise StateError(self.corrupt)
        if not self.first_step <= step <= self.next_step:
            raise StateError(
                f"the seed log {self.path} has the steps {self.first_step} to {self.next_step - 1}, which do not "
                f"continue weights that are at step {step}"
            )
        return tuple(entry for entry in self.steps if entry.step >= step)

    def upto(self, step: int) -> bytes:
        """Returns the bytes of the file as it was when ``step`` was the next one."""
        end = next((at for entry, at in zip(self.steps, self.parsed.offsets, strict=True) if entry.step >= step), None)
        return self.path.read_bytes()[: self.parsed.end if end is None else end]


def set_aside(path: Path) -> Path | None:
    """Renames an existing log and returns its new path; None if there is no log, or one without steps to keep."""
    if not path.exists():
        return None
    try:
        if not SeedLog.read(path).steps:
            return None
    except StateError:
        pass  # keep the file, even if it is not a log
    number = 1
    while (other := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    os.rename(path, other)
    logger.info("the seed log of an earlier run is kept as %s", other)
    return other
