"""Laws of the strategies on two devices, as Lightning launches them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning_ranks
import pytest
import torch
from lightning_helpers import QUIET

from zo_core.seedlog import SeedLog, replay

pytestmark = [*QUIET, pytest.mark.slow, pytest.mark.timeout(900)]  # launches of two processes

Found = dict[str, Any]

#: The runs of each launch: those that are resumed have an end before that.
LAUNCHES = (
    ("zo", "zo_offload", "points", "uneven", "interrupted"),
    ("backprop", "backprop points", "backprop interrupted"),
    ("resumed", "backprop resumed"),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[Found, Found]]]:
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(lightning_ranks.__file__)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[2])}
    found = {}
    for launch in LAUNCHES:
        command = [sys.executable, str(script), str(folder), *launch]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-4000:]
        for which in launch:
            first, second = (torch.load(folder / f"{which}{rank}.pt", weights_only=False) for rank in range(2))
            found[which] = first, second
    return folder, found


def equal(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", ["zo", "zo_offload", "resumed", "points", "uneven"])
def test_processes_hold_the_same_bits_and_the_one_log_replays(runs: Any, name: str) -> None:
    folder, found = runs
    first, second = found[name]
    assert equal(first["state"], second["state"])
    assert first["metrics"] == second["metrics"]
    model = lightning_ranks.Module()
    assert not equal(first["state"], model.state_dict())
    replay(model, folder / name / "seedlog.zo")
    assert equal(first["state"], model.state_dict())


@pytest.mark.parametrize("name", ["backprop", "backprop points", "backprop resumed"])
def test_processes_hold_the_same_bits_with_backprop(runs: Any, name: str) -> None:
    first, second = runs[1][name]
    assert equal(first["state"], second["state"])
    assert first["metrics"] == second["metrics"]
    assert not equal(first["state"], lightning_ranks.Module().state_dict())


def test_backprop_with_points_is_one_process(runs: Any, tmp_path: Path) -> None:
    alone = lightning_ranks.alike(tmp_path, devices=1)
    assert equal(runs[1]["backprop points"][0]["state"], alone["state"])


def test_a_resumed_run_with_backprop_is_an_uninterrupted_one(runs: Any) -> None:
    whole, half, again = (runs[1][f"backprop{name}"][0]["state"] for name in ("", " interrupted", " resumed"))
    assert not equal(whole, half)
    assert equal(whole, again)


def test_an_epoch_of_unknown_length_ends_in_both(runs: Any) -> None:
    assert [(each["steps"], each["epochs"]) for each in runs[1]["uneven"]] == [(lightning_ranks.STEPS, 3)] * 2


def test_points_are_dealt_out(runs: Any) -> None:
    steps = SeedLog.read(runs[0] / "points" / "seedlog.zo").steps
    assert [len(step.probes) for step in steps] == [1] * lightning_ranks.STEPS


def test_streamed_processes_are_resident_ones(runs: Any) -> None:
    assert equal(runs[1]["zo"][0]["state"], runs[1]["zo_offload"][0]["state"])


def test_a_resumed_run_is_an_uninterrupted_one(runs: Any) -> None:
    assert not equal(runs[1]["zo"][0]["state"], runs[1]["interrupted"][0]["state"])
    assert equal(runs[1]["zo"][0]["state"], runs[1]["resumed"][0]["state"])


def test_each_process_has_directions_of_its_own(runs: Any) -> None:
    steps = SeedLog.read(runs[0] / "zo" / "seedlog.zo").steps
    assert [len(step.probes) for step in steps] == [2] * lightning_ranks.STEPS
