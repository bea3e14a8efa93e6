"""The values of a log line for the steps since the previous one."""

from __future__ import annotations

import math
from dataclasses import dataclass

from zo_core import StepRecord


@dataclass
class Summary:
    """Sums over steps, so that memory does not grow with the number of steps between two logs."""

    steps: int = 0
    skipped: int = 0
    directions: int = 0
    clipped: int = 0
    measured: int = 0
    squares: float = 0.0

    def add(self, record: StepRecord) -> None:
        """Counts a step."""
        self.steps += 1
        self.skipped += record.skipped is not None or record.without_signal
        self.directions += len(record.probes)
        self.clipped += record.clipped
        if math.isfinite(record.projected_grad):
            self.measured += 1
            self.squares += record.projected_grad * record.projected_grad

    def numbers(self) -> dict[str, float]:
        """Returns the root mean square of projected gradients, the share of clipped probes, and any skipped steps."""
        result = {
            "projected_grad": math.sqrt(self.squares / self.measured) if self.measured else float("nan"),
            "zo_clip_rate": self.clipped / self.directions if self.directions else 0.0,
        }
        return {**result, "zo_skipped_steps": float(self.skipped)} if self.skipped else result
