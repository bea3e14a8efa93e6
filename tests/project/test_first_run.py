"""The benchmark of first runs goes on where it was stopped, and its table compares with the best of the grid."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import pytest
import torch

from benchmarks import first_run, report, task_list
from benchmarks.first_run import Cell, Outcome, grid, main
from benchmarks.task_list import make_task
from benchmarks.tasks import held_out


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    return tmp_path


def test_a_second_call_runs_nothing_again(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--tasks", "linear", "mlp", "--seeds", "1", "--steps", "4", "--contenders", "default", "grid"]
    words += ["--cache", str(results / "models")]
    main(words)
    shown = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("linear 0 4 linear {} ") for line in shown) in range(6, 1 + first_run.RATES + 1)
    assert [line.split()[1] for line in shown[-2:]] == ["linear", "mlp"]

    monkeypatch.setattr(first_run, "run", lambda cell, **others: pytest.fail(f"{cell} runs again"))
    main(words)
    assert capsys.readouterr().out.splitlines() == shown[-4:]
    main([*words, "--table"])
    assert capsys.readouterr().out.splitlines() == shown[-4:]


@pytest.mark.slow
def test_cells_of_a_fixed_grid_run_in_processes_of_their_own(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--tasks", "linear", "--seeds", "1", "--steps", "4", "--powers", "-2", "-1", "--workers", "2"]
    words += ["--contenders", "default", "constant-default", "grid", "--cache", str(results / "models")]
    main([*words, "--seconds", "0"])
    assert not (results / "results").exists()
    main(words)
    shown = capsys.readouterr().out.splitlines()
    cells = sorted(line.split()[:6] for line in shown if line.startswith("linear 0 4"))
    whole = [("constant", "default"), ("linear", "0.25"), ("linear", "0.5"), ("linear", "default")]
    assert cells == [["linear", "0", "4", schedule, "{}", contender] for schedule, contender in whole]
    assert shown[-3].count("constant-default: loss") == 1
    row = shown[-1].split(" | ")
    assert row[0] == "| linear"
    assert all(row)


def test_tasks_whose_packages_are_missing_are_left_out(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(task_list, "find_spec", lambda name: None)
    main(["--tasks", "llama-lora", "linear", "--seeds", "1", "--steps", "1"])
    assert capsys.readouterr().out.splitlines()[:2] == [
        "llama-lora is left out: it needs peft",
        "linear is left out: it needs sklearn",
    ]


def test_the_best_rate_of_the_grid_is_found() -> None:
    runs = grid(Cell("linear", 0, 1, "linear", "{}", ""), near=1e-6)
    tried = [float(next(runs).contender)]
    with contextlib.suppress(StopIteration):
        while True:
            tried.append(float(runs.send(Outcome(tried[-1], 2.0, abs(math.log2(tried[-1]) + 11.0))).contender))
    assert 2.0**-11 in [pytest.approx(rate) for rate in tried]
    assert len(tried) == len(set(tried)) <= first_run.RATES


def test_a_task_is_the_same_whether_its_model_was_trained_or_read(tmp_path: Path) -> None:
    trained, read = make_task("linear", tmp_path), make_task("linear", tmp_path)
    assert torch.equal(trained.model[1].weight, read.model[1].weight)  # type: ignore[index]
    assert held_out(trained, trained.model) == held_out(read, read.model) > 1.0
