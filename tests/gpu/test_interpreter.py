"""The laws of Triton's kernels hold in Triton's interpreter, where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent

#: What the kernels need of the interpreter; some versions cannot do it with some versions of numpy.
TRIAL = """
import torch, triton, triton.language as tl
@triton.jit
def trial(out, steps, BLOCK: tl.constexpr):
    at = tl.zeros((), tl.int32)
    for _ in range(steps):
        at += 1
    tl.store(out + tl.arange(0, BLOCK), tl.arange(0, BLOCK) + at)
out = torch.zeros(8, dtype=torch.int32)
trial[(1,)](out, 3, BLOCK=8)
assert out.tolist() == list(range(3, 11))
"""


@pytest.mark.slow
def test_kernels_give_the_bits_of_eager_passes(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    (tmp_path / "trial.py").write_text(TRIAL)  # Triton reads the source
    trial = subprocess.run([sys.executable, tmp_path / "trial.py"], env=environment, capture_output=True, text=True)
    if trial.returncode:
        pytest.skip(f"Triton's interpreter does not work here: {trial.stderr.strip().splitlines()[-1]}")
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    command = [*tests, *map(str, HERE.glob("test_triton*.py"))]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[1], timeout=280)
    assert run.returncode == 0, run.stdout[-8000:]
    assert "passed" in run.stdout
