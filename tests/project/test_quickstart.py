"""Law: the first script that a stranger runs prints a table, and the table is true."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quickstart_table import TRAINERS, check, read

ROOT = Path(__file__).parents[2]

LOG = """
WARNING: Retrying (Retry(total=4)) after connection broken

Held-out accuracy before: 0.703

            accuracy    loss  steps    time     tensors    memory      peak
ZOTrainer      0.939   0.225    200    52 s     3.4 MiB     1 MiB     3 MiB
Trainer        0.965   0.139     40     5 s    12.3 MiB    15 MiB    20 MiB
"""


@pytest.mark.slow
def test_the_table_is_printed_and_both_trainers_learn() -> None:
    """In a small setting; CI checks what the whole run prints."""
    command = [sys.executable, ROOT / "examples" / "quickstart.py", "--steps", "25", "--pretraining-steps", "60"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    before, rows = read(result.stdout)
    assert all(row.accuracy > before for row in rows.values())
    if sys.platform == "linux":
        assert all(0 <= row.memory <= row.peak + 4 for row in rows.values())
    assert rows["ZOTrainer"].tensors < rows["Trainer"].tensors / 2


def test_tensors_are_counted_while_they_live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    there = torch.zeros(2**20)
    with importlib.import_module("quickstart").Tensors() as tensors:
        there.mul_(2.0).view(2, -1)
        assert tensors.peak == 0.0
        one = torch.ones(2**20)
        one.view(2, -1).add_(1.0)
        assert tensors.peak == 4.0
        del one
        two = torch.ones(2**20)
        assert tensors.peak == 4.0
        assert (two + two).numel() == 2**20
    assert tensors.peak == 8.0


def test_the_table_of_a_good_run_passes_the_check() -> None:
    assert tuple(read(LOG)[1]) == TRAINERS
    check(LOG)


@pytest.mark.parametrize(
    ("right", "wrong", "complaint"),
    [
        ("0.939", "0.626", "ZOTrainer has hardly learnt"),
        ("0.939", "0.860", "ZOTrainer is far behind"),
        (" 3.4 MiB", "13.4 MiB", "ZOTrainer's tensors take 13.4 MiB"),
        ("Trainer        0", "", "no table"),
        ("\nHeld", "\nFutureWarning: it will be gone\nHeld", "a stranger sees these:\nFutureWarning: it will"),
    ],
)
def test_the_table_of_a_bad_run_does_not(right: str, wrong: str, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        check(LOG.replace(right, wrong))
