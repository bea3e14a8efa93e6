"""Laws of ZOTrainer under torchrun: the processes hold the same bits, those that one process computes from the log."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import hf_ranks
import pytest
import torch
from processes import torchrun

from zo_core.seedlog import SeedLog, replay

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # launches of two processes

Found = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Found, Found]:
    folder = tmp_path_factory.mktemp("ranks")
    torchrun(Path(hf_ranks.__file__), folder)
    first, second = (torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2))
    return folder, first, second


def equal(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


NAMES = ["directions", "data", "points", "accumulated", "normalised", "streamed", "resumed", "continued"]
ADAPTERS = ["adapter", "streamed adapter"]
#: Runs without a log.
BACKPROP = ["backprop", "whole backprop", "resumed backprop"]


def start(name: str) -> Any:
    return hf_ranks.adapted() if name in ADAPTERS else hf_ranks.model()


@pytest.mark.parametrize("name", NAMES + ADAPTERS + BACKPROP)
def test_processes_hold_the_same_bits(runs: tuple[Path, Found, Found], name: str) -> None:
    _, first, second = runs
    assert equal(first[name]["state"], second[name]["state"])
    assert not equal(first[name]["state"], start(name).state_dict())


@pytest.mark.parametrize("name", NAMES + ADAPTERS)
def test_the_one_log_replays_on_one_process(runs: tuple[Path, Found, Found], name: str) -> None:
    folder, first, _ = runs
    model = start(name)
    replay(model, folder / name / "seedlog.zo")
    assert equal(first[name]["state"], model.state_dict())


def test_each_process_has_directions_of_its_own(runs: tuple[Path, Found, Found]) -> None:
    folder = runs[0]
    assert {len(step.probes) for step in SeedLog.read(folder / "directions" / "seedlog.zo").steps} == {2}
    assert {len(step.probes) for step in SeedLog.read(folder / "data" / "seedlog.zo").steps} == {1}
    assert {len(step.probes) for step in SeedLog.read(folder / "normalised" / "seedlog.zo").steps} == {4}


def test_the_model_is_not_wrapped(runs: tuple[Path, Found, Found]) -> None:
    assert runs[1]["directions"]["wrapped"] == "LlamaForCausalLM"


def test_data_is_one_process_that_accumulates(runs: tuple[Path, Found, Found], tmp_path: Path) -> None:
    alone = hf_ranks.train(tmp_path, accumulate=2)
    assert equal(runs[1]["data"]["state"], alone["state"])


def test_backprop_on_data_is_one_process_that_accumulates(runs: tuple[Path, Found, Found], tmp_path: Path) -> None:
    alone = hf_ranks.train(tmp_path, accumulate=2, **hf_ranks.BACKPROP)
    assert equal(runs[1]["backprop"]["state"], alone["state"])
    norms = [
        [line["grad_norm"] for line in each["log"] if "grad_norm" in line] for each in (runs[1]["backprop"], alone)
    ]
    assert norms[0] == norms[1] != []


def test_a_resumed_run_with_backprop_is_the_whole_one(runs: tuple[Path, Found, Found]) -> None:
    assert equal(runs[1]["resumed backprop"]["state"], runs[1]["whole backprop"]["state"])


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_along_the_activations_is_that_of_one_process(
    runs: tuple[Path, Found, Found], tmp_path: Path, name: str
) -> None:
    """Resident processes found other directions at first, and have taken those of rank 0."""
    before, alone = hf_ranks.adapted().state_dict(), hf_ranks.train(tmp_path, accumulate=2, make=hf_ranks.adapted)
    assert equal(runs[1][name]["state"], alone["state"])
    moved = {key for key, value in alone["state"].items() if not torch.equal(value, before[key])}
    assert moved == {key for key in before if "lora_B" in key}
    other = hf_ranks.adapted(1).state_dict()
    assert not any(torch.equal(other[key], before[key]) for key in before if "lora_A" in key)


def test_points_are_those_of_one_process(runs: tuple[Path, Found, Found], tmp_path: Path) -> None:
    alone = hf_ranks.train(tmp_path)
    assert equal(runs[1]["points"]["state"], alone["state"])


def test_streamed_processes_are_resident_ones(runs: tuple[Path, Found, Found]) -> None:
    assert equal(runs[1]["streamed"]["state"], runs[1]["directions"]["state"])


def test_one_process_continues_what_two_began(runs: tuple[Path, Found, Found], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs[0] / "directions", folder)
    found = hf_ranks.train(folder, resume=True, max_steps=hf_ranks.STEPS + 2)
    model = hf_ranks.model()
    replay(model, folder / "seedlog.zo")
    assert equal(found["state"], model.state_dict())
    assert [len(step.probes) for step in SeedLog.read(folder / "seedlog.zo").steps] == [2] * hf_ranks.STEPS + [1] * 2


def test_a_resumed_run_is_an_uninterrupted_one(runs: tuple[Path, Found, Found]) -> None:
    assert equal(runs[1]["resumed"]["state"], runs[1]["directions"]["state"])
    assert len(SeedLog.read(runs[0] / "resumed" / "seedlog.zo").steps) == hf_ranks.STEPS


def test_a_run_that_continues_in_the_same_processes_is_an_uninterrupted_one(runs: tuple[Path, Found, Found]) -> None:
    assert equal(runs[1]["continued"]["state"], runs[1]["momentum"]["state"])
    assert (runs[1]["continued"]["stopped"], runs[2]["continued"]["stopped"]) == (False, True)


def test_a_run_that_was_killed_twice_is_an_uninterrupted_one(runs: tuple[Path, Found, Found], tmp_path: Path) -> None:
    torchrun(Path(hf_ranks.__file__).with_name("hf_restarted.py"), tmp_path, "--max-restarts=2")
    for rank in range(2):
        assert equal(torch.load(tmp_path / f"rank{rank}.pt"), runs[1]["directions"]["state"])
    assert len(SeedLog.read(tmp_path / "seedlog.zo").steps) == hf_ranks.STEPS
