"""A progress bar for what takes long and says nothing else."""

from __future__ import annotations

import sys


class Bar:
    """A progress bar on the error stream; it shows nothing if the stream is not a terminal.

    Args:
        total: the sum of all amounts given to `advance`.
        label: what is in progress.
    """

    WIDTH = 40

    def __init__(self, total: int, label: str):
        self.total, self.label, self.done, self.shown = max(1, total), label, 0, -1
        self.visible = sys.stderr.isatty()

    def advance(self, amount: int) -> None:
        self.done += amount
        percent = min(100, 100 * self.done // self.total)
        if self.visible and percent != self.shown:
            self.shown = percent
            filled = "█" * (percent * self.WIDTH // 100)
            print(f"\r{self.label} {filled:<{self.WIDTH}} {percent:3d} %", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.visible:
            print(file=sys.stderr)
