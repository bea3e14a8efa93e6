"""Law: the first script that a stranger runs prints a table, and the table is true."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from quickstart_table import TRAINERS, check, read

ROOT = Path(__file__).parents[2]

LOG = """
WARNING: Retrying (Retry(total=4)) after connection broken

Held-out accuracy before: 0.625

            accuracy    loss  steps    time  extra memory   extra peak
ZOTrainer      0.924   0.206    200    13 s         6 MiB        9 MiB
Trainer        0.957   0.165     40     1 s        36 MiB       40 MiB
"""


def test_the_table_is_printed_and_both_trainers_learn() -> None:
    """In a small setting; CI checks what the whole run prints."""
    command = [sys.executable, ROOT / "examples" / "quickstart.py", "--steps", "25", "--pretraining-steps", "60"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    before, rows = read(result.stdout)
    assert all(row.accuracy > before for row in rows.values())
    if sys.platform == "linux":
        assert all(0 <= row.memory <= row.peak + 4 for row in rows.values())
        assert rows["ZOTrainer"].memory < rows["Trainer"].memory


def test_the_table_of_a_good_run_passes_the_check() -> None:
    assert tuple(read(LOG)[1]) == TRAINERS
    check(LOG)


@pytest.mark.parametrize(
    ("right", "wrong", "complaint"),
    [
        ("0.924", "0.626", "ZOTrainer has hardly learnt"),
        ("0.924", "0.850", "ZOTrainer is far behind"),
        ("   6 MiB", " 310 MiB", "ZOTrainer took 310.0 MiB, Trainer 36.0 MiB"),
        ("Trainer        0", "", "no table"),
        ("\nHeld", "\nFutureWarning: it will be gone\nHeld", "a stranger sees these:\nFutureWarning: it will"),
    ],
)
def test_the_table_of_a_bad_run_does_not(right: str, wrong: str, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        check(LOG.replace(right, wrong))
