"""Law: processes that stream one model to CUDA from one registered copy hold the bits of those with own copies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HELPER = Path(__file__).parents[1] / "helpers" / "cuda_ranks.py"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: none is available"),
]


def run(folder: Path, how: str) -> list[dict[str, Any]]:
    """What each of two processes ends with."""
    command = [sys.executable, str(HELPER), str(folder)]
    children = [subprocess.Popen([*command, str(rank), "2", how]) for rank in range(2)]
    try:
        assert [child.wait(120) for child in children] == [0, 0]
    finally:
        for child in children:
            child.kill()
    return [torch.load(folder / f"{how}{rank}.pt") for rank in range(2)]


def test_processes_share_registered_memory(tmp_path: Path) -> None:
    shared, own = run(tmp_path, "shared"), run(tmp_path, "own")
    assert all(each["shared"] and each["registered"] for each in shared)
    assert not any(each["shared"] for each in own)
    for each in (*shared, *own):
        print(f"{each['seconds']:.4f} s a step, {'one copy' if each['shared'] else 'own copies'}")
        weights = own[0]["weights"]
        assert [name for name in weights if not torch.equal(each["weights"][name], weights[name])] == []
