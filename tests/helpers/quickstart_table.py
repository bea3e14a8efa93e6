"""Reads the output of `examples/quickstart.py`, and checks what README says of it.

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

    accuracy: float
    loss: float
    steps: float
    seconds: float
    tensors: float
    memory: float
    peak: float


def read(log: str) -> tuple[float, dict[str, Row]]:
    """The held-out accuracy before training, and the rows of the table."""
    (before,) = re.findall(r"^Held-out accuracy before: ([\d.]+)$", log, re.MULTILINE)
    rows = {
        name: Row(*map(float, numbers))
        for name, *numbers in re.findall(
            r"^(\w+) +([\d.]+) +([\d.]+) +(\d+) +(\d+) s +([\d.]+) MiB +(-?\d+) MiB +(-?\d+) MiB$", log, re.MULTILINE
        )
    }
    assert tuple(rows) == TRAINERS, f"no table was printed:\n{log}"
    return float(before), rows


def check(log: str) -> None:
    """Fails unless forward-only training nearly learns the task, takes less memory, and there are no warnings."""
    before, rows = read(log)
    zo, plain = (rows[name] for name in TRAINERS)
    assert zo.accuracy > before + 0.15, f"ZOTrainer has hardly learnt: {before} -> {zo.accuracy}"
    assert zo.accuracy > plain.accuracy - 0.1, f"ZOTrainer is far behind: {zo.accuracy}, Trainer {plain.accuracy}"
    assert zo.tensors < plain.tensors / 2, f"ZOTrainer's tensors take {zo.tensors} MiB, Trainer's {plain.tensors} MiB"
    assert all(row.memory <= row.peak + 4 for row in rows.values()), "data takes part in the peak of everything"
    warnings = re.findall(r"^(?!WARNING: ).*(?:[Ww]arning|WARNING|deprecated).*$", log, re.MULTILINE)  # but for pip's
    assert not warnings, "\n".join(["a stranger sees these:", *warnings])


if __name__ == "__main__":
    check(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print("the quickstart's table is as it should be")
