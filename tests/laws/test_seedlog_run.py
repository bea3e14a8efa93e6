"""Law: a trainer's run begins with the log as its adapter says, and one that cannot is an error or a new log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from models import closure, tiny
from traces import same_bits, weights

from zo_core import SeedLog, StateError, ZeroOrder
from zo_core.seedlog import RunLog, Start

STEPS = 4


class Run(RunLog):
    def __init__(self, path: Path, how: Start, *, strict: bool = True):
        super().__init__(path, strict=strict)
        self.how = how

    def start(self, engine: ZeroOrder) -> Start:
        return self.how


def steps(zo: ZeroOrder, run: RunLog, count: int) -> int:
    """Does so many steps as an adapter does, and returns how many of them were measured."""
    measured = 0
    for _ in range(count):
        entry = run.logged(zo)
        if entry is None:
            measured += 1
            with run.watching():
                zo.measure(closure("mlp", zo.model, zo.step_count))
        else:
            zo.repeat(entry.probes, entry.loss)
        zo.optimizer.step()
    return measured


def engine(**settings: Any) -> ZeroOrder:
    return ZeroOrder(tiny("mlp"), **{"lr": 1e-2, **settings})


def logged(path: Path) -> list[int]:
    return [entry.step for entry in SeedLog.read(path).steps]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A log of some steps from 0."""
    run = Run(tmp_path / "log", "attach")
    assert steps(engine(), run, STEPS) == STEPS
    run.end()
    return run.path


@pytest.mark.parametrize(
    ("how", "measured", "kept"), [("attach", STEPS, STEPS), ("branch", STEPS, STEPS), ("follow", 0, 0)]
)
def test_a_run_from_step_0_begins_as_it_is_told(path: Path, how: Start, measured: int, kept: int) -> None:
    run, zo = Run(path, how), engine()
    assert steps(zo, run, STEPS) == measured
    run.end()
    assert logged(path) == list(range(STEPS))
    assert len(logged(path.with_name("log-1")) if kept else []) == kept
    whole = engine()
    steps(whole, Run(path.with_name("other"), "attach"), STEPS)
    assert same_bits(weights(zo.model), weights(whole.model))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("settings", "words"), [({"eps": 0.5}, "eps"), ({"lr": 0.5}, "lr")])
def test_a_log_of_another_run_is_an_error_or_kept_aside(
    path: Path, strict: bool, settings: dict[str, Any], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its header says so, or its first step."""
    run, zo = Run(path, "follow", strict=strict), engine(**settings)
    if strict:
        with pytest.raises(StateError, match=words):
            steps(zo, run, 1)
        return
    assert steps(zo, run, STEPS + 1) == STEPS + 1
    run.end()
    assert "kept aside" in caplog.text
    assert logged(path) == list(range(STEPS + 1))
    assert logged(path.with_name("log-1")) == list(range(STEPS))


def test_a_run_that_goes_back_begins_a_new_log(path: Path) -> None:
    run, zo = Run(path, "attach"), engine()
    steps(zo, run, 2)
    zo.at(1)
    assert steps(zo, run, 1) == 1
    run.end()
    assert logged(path) == [1]


@pytest.mark.parametrize("touched", [False, True])
def test_what_an_interrupted_run_has_moved_is_not_moved_again(path: Path, touched: bool) -> None:
    run, zo = Run(path, "attach"), engine()
    steps(zo, run, 2)
    run.stop(interrupted=True)
    if touched:
        zo.slots[0].tensor.data.add_(1.0)
    before = weights(zo.model)
    again = Run(path, "follow")
    again.take_up(run)
    zo.at(0)
    if touched:
        with pytest.raises(StateError):  # the weights are not those that the log begins with
            steps(zo, again, 1)
        return
    assert steps(zo, again, 2) == 0
    assert same_bits(weights(zo.model), before)
