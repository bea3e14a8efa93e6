"""A run that was interrupted in this process: its weights are in memory, at the last step of its log."""

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
    """Where an interrupted run is, for the one that goes on in the same process.

    Attributes:
        engine: has the weights and the state of the rule.
        path: of the log.
        step: its next one.
        chain: checksum of its last record.
        digest: fingerprint of the weights.
    """

    engine: ZeroOrder
    path: Path
    step: int
    chain: int
    digest: str

    @classmethod
    def of(cls, log: SeedLogWriter) -> Stopped | None:
        """For a run that stops here; None unless the weights are those of the log's last step.

        Reads all weights, as the start of a run does.
        """
        engine = log.engine
        if not engine.continuity.whole or step_of(engine) != log.next_step:
            return None
        return cls(engine, log.path, log.next_step, log.chain, fingerprint(engine)["digest"])

    def still(self, path: Path) -> bool:
        """Whether nothing has touched the engine, its weights or the log since."""
        try:
            log = SeedLog.read(path)
        except StateError:
            return False
        logged = log.path == self.path and (log.next_step, log.parsed.chain) == (self.step, self.chain)
        mine = self.engine.continuity.whole and step_of(self.engine) == self.step
        return logged and mine and fingerprint(self.engine)["digest"] == self.digest


def step_of(engine: ZeroOrder) -> int:
    """The step that the weights of an engine are at, which its count is behind while steps are repeated."""
    return max(engine.step_count, engine.continuity.ahead)
