"""Law: steps that are too long for the noise are halved, those of a good length are not, and logs and resumes agree."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from traces import same_bits, weights

from benchmarks.first_run import Cell, run
from zo_core import SeedLog, SeedLogWriter, StepRecord, ZeroOrder, replay
from zo_core.brake.trust import TooLong, Trust
from zo_core.records import Rollback

NOISE = 0.2


def judged(seed: int, steps: int, cost: float, fall: Callable[[int], float]) -> list[tuple[int, TooLong]]:
    """The alarms of a run whose mean loss falls in each step by ``fall``, in units of what a step costs."""
    noise, trust, loss = np.random.default_rng(seed), Trust(), 2.0
    found = []
    for step in range(steps):
        alarm = trust.see(step, loss + NOISE * noise.standard_normal(), step // 2)
        if alarm is not None:
            found.append((step, alarm))
        trust.paid(cost)
        loss -= cost * fall(step)
    return found


def test_steps_of_the_best_length_are_rarely_too_long() -> None:
    alarms = sum(bool(judged(seed, 1024, 1e-3, lambda step: 1.0)) for seed in range(200))
    assert alarms <= 6  # six comparisons in each run, with a probability of 0.13%


@pytest.mark.parametrize("fall", [1.5, 3.0])
def test_shorter_steps_never_are(fall: float) -> None:
    assert not any(judged(seed, 1024, 1e-3, lambda step: fall) for seed in range(100))


@pytest.mark.parametrize(("cost", "within"), [(1e-2, 64), (4e-3, 128), (1e-3, 512)])
@pytest.mark.parametrize("fall", [0.0, -1.0])
def test_steps_without_effect_are_found_within_a_known_number(cost: float, within: int, fall: float) -> None:
    for seed in range(20):
        step, alarm = judged(seed, within, cost, lambda step: fall)[0]
        assert alarm.cost == pytest.approx(cost * (step + 1) / 2)
        assert alarm.step in (step // 2, step)  # the best weights so far, or by chance those that it has


def test_updates_are_kept_if_the_loss_has_fallen() -> None:
    step, alarm = judged(0, 4096, 1e-2, lambda step: 0.6)[0]
    assert alarm.step == step


def test_a_run_that_has_learnt_for_long_is_watched_from_where_it_stops() -> None:
    found = judged(0, 4096, 2e-3, lambda step: 4.0 if step < 2000 else 0.0)
    assert 2000 < found[0][0] < 2600


def test_losses_without_costs_raise_no_alarm() -> None:
    assert not judged(0, 1024, 0.0, lambda step: 0.0)


def test_a_rise_of_less_than_one_percent_is_none() -> None:
    trust = Trust()
    assert not any(trust.see(step, 1.0 + 1e-6 * step, 0) for step in range(4096))


def test_a_test_that_was_saved_goes_on_as_if_it_had_not_been() -> None:
    for stop in (0, 5, 16, 40, 63, 64):
        whole, noise = Trust(), np.random.default_rng(1)
        again = Trust()
        for step in range(200):
            if step == stop:
                again.load(whole.saved())
            loss = float(noise.standard_normal())
            first = whole.see(step, loss, 0)
            second = again.see(step, loss, 0) if step >= stop else first
            assert first == second
            whole.paid(0.02)
            again.paid(0.02)
        assert whole.saved() == again.saved()
    again.load({})
    assert again.saved() == Trust().saved()


# Whole runs

STEPS = 160


def guessing(seed: int = 0) -> tuple[nn.Module, Callable[[int], Callable[[], Tensor]]]:
    """A classifier of labels that say nothing about its inputs: all that a step sees is the noise of its batch."""
    torch.manual_seed(seed)
    model = nn.Linear(32, 10)
    nn.init.zeros_(model.weight)

    def closure(step: int) -> Callable[[], Tensor]:
        generator = torch.Generator().manual_seed(1000 * seed + step)
        x, y = torch.randn(8, 32, generator=generator), torch.randint(0, 10, (8,), generator=generator)
        return lambda: F.cross_entropy(model(x), y)

    return model, closure


def train(
    log: Path | None, zo: ZeroOrder, closure: Any, steps: range = range(STEPS)
) -> tuple[list[StepRecord], list[dict[str, Tensor]]]:
    """Returns the records, and the weights before each step and after the last."""
    writer = None if log is None else SeedLogWriter.attach(zo, log)
    records, seen = [], [weights(zo.model)]
    for step in steps:
        records.append(zo.step(closure(step)))
        seen.append(weights(zo.model))
    if writer is not None:
        writer.close()
    return records, seen


METHODS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "momentum": {"rule": "momentum"},
    "several directions": {"num_probes": 3},
    "low rank": {"noise": {"name": "low_rank", "refresh": 5}},
}


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_a_run_takes_shorter_steps_and_its_log_replays(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, closure = guessing()
    zo = ZeroOrder(model, brake="rollback", **settings)
    with caplog.at_level(logging.WARNING):
        records, seen = train(tmp_path / "log", zo, closure)
    done = {record.step: record.rollback for record in records if record.rollback is not None}
    assert done
    (first, rollback), *_ = done.items()
    assert rollback == Rollback(0, 0.25)  # nothing was learnt
    assert records[first].skipped
    assert records[first + 1].lr == 0.25 * records[first].lr
    lines = [message for message in caplog.messages if "too long for the noise" in message]
    assert len(lines) == len(done)
    assert "from here on the learning rate is 0.25 of what is set" in lines[0]
    assert [entry.rollback for entry in SeedLog.read(tmp_path / "log").steps] == [one.rollback for one in records]
    for until in (first, first + 1, STEPS):
        again = guessing()[0]
        replay(again, tmp_path / "log", until)
        assert same_bits(weights(again), seen[until])


def test_the_weights_stay_if_the_loss_has_fallen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, closure = guessing()
    zo = ZeroOrder(model, brake="rollback")

    def easier(step: int) -> Callable[[], Tensor]:
        loss = closure(step)
        return lambda: loss() + 0.0075 * (STEPS - step)

    with caplog.at_level(logging.WARNING):
        records, seen = train(tmp_path / "log", zo, easier)
    ((step, rollback),) = [(record.step, record.rollback) for record in records if record.rollback is not None]
    assert rollback == Rollback(step, 0.5)
    assert same_bits(seen[step], seen[step + 1])
    assert records[step].normaliser == records[step - 1].normaliser
    assert "the weights stay, and from here on the learning rate is 0.5" in caplog.text
    again = guessing()[0]
    replay(again, tmp_path / "log")
    assert same_bits(weights(again), seen[-1])


@pytest.mark.parametrize("stop", [20, 40, 70, 110, 130])
def test_a_resumed_run_is_the_uninterrupted_one(stop: int, tmp_path: Path) -> None:
    model, closure = guessing()
    zo = ZeroOrder(model, brake="rollback")
    whole, _ = train(None, zo, closure)
    assert any(record.rollback for record in whole)

    model, closure = guessing()
    stopped = ZeroOrder(model, brake="rollback")
    train(None, stopped, closure, range(stop))
    torch.save({"model": model.state_dict(), "zo": stopped.state_dict()}, tmp_path / "checkpoint")
    kept = torch.load(tmp_path / "checkpoint", weights_only=True)
    model, closure = guessing()
    model.load_state_dict(kept["model"])
    resumed = ZeroOrder(model, brake="rollback")
    resumed.load_state_dict(kept["zo"])
    rest, _ = train(None, resumed, closure, range(stop, STEPS))
    assert [(one.loss, one.lr, one.rollback) for one in rest] == [
        (one.loss, one.lr, one.rollback) for one in whole[stop:]
    ]
    assert same_bits(weights(model), weights(zo.model))


@pytest.mark.parametrize("stop", [40, 127, 140])
def test_repeated_steps_leave_the_test_as_measured_ones_do(stop: int, tmp_path: Path) -> None:
    model, closure = guessing()
    zo = ZeroOrder(model, brake="rollback")
    records, _ = train(tmp_path / "log", zo, closure)
    model, closure = guessing()
    again = ZeroOrder(model, brake="rollback")
    for record in SeedLog.read(tmp_path / "log").steps[:stop]:
        again.repeat(record.probes, record.loss, record.normaliser, record.rollback)
        again.apply()
    rest, _ = train(None, again, closure, range(stop, STEPS))
    assert [one.rollback for one in rest] == [one.rollback for one in records[stop:]]
    assert again.braking.trust.saved() == zo.braking.trust.saved()
    assert same_bits(weights(model), weights(zo.model))


def test_a_bare_loop_says_so_and_none_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    for brake, lines in (("warn", 1), (None, 0)):
        caplog.clear()
        model, closure = guessing()
        with caplog.at_level(logging.WARNING):
            records, _ = train(None, ZeroOrder(model, brake=brake), closure)
        assert not any(record.rollback for record in records)
        found = [message for message in caplog.messages if "too long for the noise" in message]
        assert bool(found) == bool(lines)
        assert all("brake='rollback' goes back and takes a quarter of it" in message for message in found)


def test_a_loss_without_noise_is_never_slowed() -> None:
    weight = nn.Parameter(torch.ones(50))
    scales = torch.linspace(0.1, 10.0, 50)
    zo = ZeroOrder(nn.ParameterList([weight]), brake="rollback")
    records = [zo.step(lambda: (scales * weight * weight).sum()) for _ in range(2000)]
    assert not any(record.rollback for record in records)
    assert records[-1].loss < 1e-2 * records[0].loss


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20))])
def test_the_default_is_not_slowed_where_it_is_right(seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4))
    truth = torch.randn(20, 4)
    zo = ZeroOrder(model, brake="rollback", seed=seed)
    for _ in range(600):
        x = torch.randn(64, 20)
        y = (x @ truth).argmax(1)
        record = zo.step(lambda x=x, y=y: F.cross_entropy(model(x), y))
        assert record.rollback is None


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
@pytest.mark.parametrize("directions", [1, 2])
def test_batches_of_one_row_leave_no_run_worse_than_it_began(directions: int, seed: int) -> None:
    """The gradient of a row says little about that of all: a step that follows it goes ten times too far."""
    torch.manual_seed(seed)
    model, rows, others = nn.Linear(32, 2), torch.randn(64, 32), torch.randn(512, 32)

    def loss(x: Tensor) -> Tensor:
        return (model(x) - 1.0).square().mean()

    before = loss(others).item()
    zo = ZeroOrder(model, brake="rollback", seed=seed, num_probes=directions)
    for _ in range(500):
        row = rows[torch.randint(64, (1,))]
        zo.step(lambda row=row: loss(row))
    assert loss(others).item() < before


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("schedule", "steps"), [("linear", 300), ("constant", 800)])
@pytest.mark.parametrize("task", ["bert-head", "bert-head-modules"])
def test_a_head_on_noisy_batches_ends_no_worse_than_it_began(
    task: str, schedule: str, steps: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "models"
    found = run(Cell(task, seed, steps, schedule, "{}", "default"), folder, torch.device("cpu"))
    assert found.after < found.before
