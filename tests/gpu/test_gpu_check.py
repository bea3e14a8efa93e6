"""The script for machines with a GPU works where there is none, part by part."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import SUITES

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.sh"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="needs GNU timeout")
def test_dry_run(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHON": sys.executable}
    run = subprocess.run([SCRIPT, tmp_path, "--dry-run"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    ended = (tmp_path / "summary").read_text().splitlines()
    assert len(ended) == 14
    assert all(line.endswith("right") for line in ended)
    said = {path.stem: path.read_text() for path in tmp_path.glob("*.log")}
    assert "zo step, streamed" in said["opt"]
    assert " passed" in said["races"]
    assert "skipped" in said["tests-methods"]
    assert "hooks and mode" in said["host"]
    for library in ("bitsandbytes", "torchao"):
        assert f"| {library} | zo step, resident |" in said["int4"] or f"{library} is not installed" in said["int4"]


def test_a_part_that_fails_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHON": "false"}
    run = subprocess.run([SCRIPT, tmp_path, "--dry-run"], env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    ended = (tmp_path / "summary").read_text().splitlines()
    assert len(ended) == 14
    assert all(line.endswith("exit status 1") for line in ended)


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_has_options_that_its_benchmarks_have(suite: str) -> None:
    for name, *options in SUITES[suite]:
        source = (SCRIPT.parent / f"{name}.py").read_text()
        assert not [option for option in options if option.startswith("--") and f'"{option}"' not in source], name
