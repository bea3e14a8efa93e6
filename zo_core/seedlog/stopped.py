"""A run that was interrupted in this process: the weights in memory are those of the last step of its log."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import StateError
from .fingerprint import fingerprint
from .log import SeedLog
from .writer import SeedLogWriter

if TYPE_CHECKING:
    from ..engine import ZeroOrder


@dataclass(frozen=True)
class Stopped:
    """The state of an interrupted run, for another run that continues it in the same process.

    Attributes:
        engine: the engine, with the weights and the state of the rule.
        path: path of the log.
        step: the next step of the log.
        chain: checksum of the log's last record; None in a process that does not write the log.
        digest: digest of the fingerprint of the weights.
    """

    engine: ZeroOrder
    path: Path
    step: int
    chain: int | None
    digest: str

    @classmethod
    def of(cls, log: SeedLogWriter) -> Stopped | None:
        """Describes a run that stops now; returns None unless the weights are those of the log's last step.

        Reads all weights, as the start of a run does.
        """
        engine = log.engine
        if not engine.continuity.whole or step_of(engine) != log.next_step:
            return None
        return cls(engine, log.path, log.next_step, log.chain, fingerprint(engine)["digest"])

    @classmethod
    def beside(cls, engine: ZeroOrder, path: Path) -> Stopped | None:
        """As `of`, in a process that does not write the log; its weights are compared with those of rank 0 later."""
        return cls(engine, path, step_of(engine), None, "") if engine.continuity.whole else None

    def still(self, path: Path) -> bool:
        """Whether the engine, its weights and the log are unchanged since the interrupt."""
        if self.chain is None:
            return path == self.path and self.engine.continuity.whole and step_of(self.engine) == self.step
        try:
            log = SeedLog.read(path)
        except StateError:
            return False
        logged = log.path == self.path and (log.next_step, log.parsed.chain) == (self.step, self.chain)
        mine = self.engine.continuity.whole and step_of(self.engine) == self.step
        return logged and mine and fingerprint(self.engine)["digest"] == self.digest


def step_of(engine: ZeroOrder) -> int:
    """Returns the step that an engine's weights are at; its step count is lower while it repeats steps."""
    return max(engine.step_count, engine.continuity.ahead)
