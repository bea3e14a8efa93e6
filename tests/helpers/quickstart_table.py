"""Reads the output of `examples/quickstart.py`, and checks that it agrees with README.

python tests/helpers/quickstart_table.py LOG
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

TRAINERS = ("ZOTrainer", "Trainer")


@dataclass(frozen=True)
class Row:
    """A row of the table, for one trainer; memory in MiB."""

    loss: float
    seconds: float
    rate: float
    memory: float
    peak: float


def read(log: str) -> tuple[float, dict[str, Row]]:
    """The held-out loss before training, and the rows of the table."""
    (before,) = re.findall(r"^Held-out loss before: ([\d.]+) ", log, re.MULTILINE)
    rows = {
        name: Row(*map(float, numbers))
        for name, *numbers in re.findall(
            r"^(\w+) +([\d.]+) +(\d+) s +(\d+) +(-?\d+) MiB +(-?\d+) MiB$", log, re.MULTILINE
        )
    }
    assert tuple(rows) == TRAINERS, f"no table was printed:\n{log}"
    return float(before), rows


def check(log: str) -> None:
    """Fails unless both trainers learn, forward-only training takes less memory, and there are no warnings."""
    before, rows = read(log)
    zo, plain = (rows[name] for name in TRAINERS)
    assert zo.loss < before, f"ZOTrainer has not learnt: {before} -> {zo.loss}"
    assert plain.loss < before, f"Trainer has not learnt: {before} -> {plain.loss}"
    assert zo.memory < plain.memory, f"ZOTrainer took {zo.memory} MiB, Trainer {plain.memory} MiB"
    assert all(row.memory <= row.peak + 4 for row in rows.values()), "data takes part in the peak of everything"
    warnings = re.findall(r"^(?!WARNING: ).*(?:[Ww]arning|WARNING|deprecated).*$", log, re.MULTILINE)  # but for pip's
    assert not warnings, "\n".join(["a stranger sees these:", *warnings])


if __name__ == "__main__":
    check(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print("the quickstart's table is as it should be")
