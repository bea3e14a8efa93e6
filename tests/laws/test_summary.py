"""Law: the numbers of a log line are what the records of the steps say, and a seed log gives the same running mean."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import batch, tiny

from zo_core import Probe, SeedLog, SeedLogWriter, StepRecord, Summary, ZeroOrder
from zo_core.summary import WINDOW


def record(step: int, loss: float, **changes: Any) -> StepRecord:
    values: dict[str, Any] = {"projected_grad": 1.0, "lr": 1e-6, "seed": 0, "probes": (Probe(0, 1.0),), **changes}
    return StepRecord(loss=loss, step=step, **values)


def summed(records: list[StepRecord]) -> Summary:
    summary = Summary()
    for each in records:
        summary.add(each)
    return summary


def test_the_loss_is_the_mean_of_a_window_of_steps_whatever_the_lines_are() -> None:
    losses = np.random.default_rng(0).normal(3.0, 0.5, WINDOW + 200)
    often, summary = Summary(), summed([record(step, float(loss)) for step, loss in enumerate(losses)])
    for step, loss in enumerate(losses):
        often.add(record(step, float(loss)))
        line = often.numbers()
    last = losses[-WINDOW:].astype(np.float32).astype(np.float64)
    assert line["zo_loss_mean"] == math.fsum(last) / WINDOW
    assert line["zo_loss_se"] == pytest.approx(last.std(ddof=1) / math.sqrt(WINDOW), rel=1e-12)
    assert summary.numbers() == line


def test_one_loss_has_no_standard_error_and_none_has_no_mean() -> None:
    assert summed([]).numbers().keys() == {"projected_grad"}
    assert summed([record(0, 2.0)]).numbers().keys() == {"projected_grad", "zo_loss_mean", "zo_lr"}
    assert summed([record(0, math.nan)]).numbers().keys() == {"projected_grad", "zo_lr"}


def test_a_loss_that_is_not_finite_in_float32_does_not_enter_the_mean() -> None:
    losses = [1.0, math.nan, 2.0, math.inf, -math.inf, 1e39, 6.0]
    line = summed([record(step, loss, skipped="no number") for step, loss in enumerate(losses)]).numbers()
    assert line["zo_loss_mean"] == 3.0
    assert line["zo_loss_se"] == pytest.approx(math.sqrt((4 + 1 + 9) / 2 / 3))


def test_counts_are_there_if_they_count_something_and_begin_again_with_each_line() -> None:
    quiet = [record(0, 1.0), record(1, 1.0)]
    steps = [
        record(2, 1.0, clipped=2, projected_grad=3.0, lr=1e-7),
        record(3, 1.0, probes=(), skipped="the losses agree", projected_grad=math.nan),
        record(4, 1.0, probes=(Probe(0, 0.0),), projected_grad=0.0, clipped=1, lr=1e-8),
    ]
    summary = summed(quiet)
    assert summary.steps == 2
    assert not {"zo_skipped_steps", "zo_clipped_directions"} & summary.numbers().keys()
    for each in steps:
        summary.add(each)
    assert summary.steps == 3
    line = summary.numbers()
    assert (line["zo_skipped_steps"], line["zo_clipped_directions"], line["zo_lr"]) == (2.0, 3.0, 1e-8)
    assert line["projected_grad"] == math.sqrt(9.0 / 2)
    assert math.isnan(summary.numbers()["projected_grad"])
    assert summary.steps == 0


def test_an_optimizer_without_a_rate_has_none_in_its_lines() -> None:
    assert "zo_lr" not in summed([record(0, 1.0, lr=math.nan)]).numbers()


def test_a_run_that_goes_back_begins_again() -> None:
    """A learning-rate finder does."""
    summary = summed([record(step, 100.0, clipped=1) for step in range(5)])
    again = [record(0, 1.0), record(1, 2.0)]
    for each in again:
        summary.add(each)
    assert summary.numbers() == summed(again).numbers()


def test_a_seed_log_has_the_losses_of_the_running_mean(tmp_path: Path) -> None:
    model, data = tiny("llama"), batch("llama")
    zo, summary = ZeroOrder(model, lr=1e-2), Summary()
    zo.listeners.append(summary.add)
    log = SeedLogWriter.attach(zo, tmp_path / "seedlog.zo")
    for _ in range(5):
        zo.step(lambda: model(**data).loss / 3)
    log.close()
    again = Summary()
    again.resume(entry.loss for entry in SeedLog.read(tmp_path / "seedlog.zo").steps)
    line = summary.numbers()
    assert again.numbers().items() >= {(name, line[name]) for name in ("zo_loss_mean", "zo_loss_se")}
    assert line["zo_loss_se"] > 0
