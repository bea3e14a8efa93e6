"""Law: runs with a second round are equal wherever they are measured, and replay, resume and count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import closure, tiny
from test_second_round import INPUTS, LR, PLACE, PLACES, Noisy, engine, finished
from torch import Tensor, nn
from traces import same_bits, weights

from zo_core import (
    ConfigError,
    LossError,
    Momentum,
    Rademacher,
    SeedLog,
    SeedLogWriter,
    ZeroOrder,
    ZOConfig,
    replay,
    retrying,
)
from zo_core.noise import Alternatives, Direction, stacked_values

# Variables that a loop changes

BATCH = INPUTS[0]


class Method:
    def __init__(self, loss: Callable[[], Tensor]):
        self.loss, self.calls = loss, 0

    def measure(self) -> Tensor:
        self.calls += 1
        return self.loss()


class Global:
    def __call__(self) -> Tensor:
        return MODEL(BATCH).sum()  # type: ignore[no-any-return]


MODEL = nn.Linear(8, 2)

#: Closures that read a variable, given a model and a function that reads it.
LATE: dict[str, Callable[[Callable[[], Tensor]], Callable[[], Any]]] = {
    "itself": lambda read: read,
    "partial": lambda read: partial(read),
    "wrapped": lambda read: retrying(read),
    "argument": lambda read: partial(lambda loss: loss(), read),
    "global": lambda read: lambda: MODEL(BATCH).sum(),
    "inner": lambda read: lambda: torch.stack([MODEL(BATCH).sum() for _ in range(1)]).sum(),
    "object": lambda read: Global(),
    "method": lambda read: Global().__call__,
}


@pytest.mark.parametrize("late", LATE.values(), ids=LATE)
def test_a_closure_that_reads_what_its_loop_has_changed_is_an_error(
    late: Callable[[Callable[[], Tensor]], Callable[[], Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = nn.Linear(8, 2), nn.Linear(8, 2)
    other.load_state_dict(model.state_dict())
    monkeypatch.setitem(globals(), "MODEL", model)
    zo, expected = engine(model), engine(other)
    before = weights(model)
    for x in INPUTS:
        monkeypatch.setitem(globals(), "BATCH", x)
        zo.measure(late(lambda: model(x).sum()))  # noqa: B023
    name = r"(x|BATCH)"
    with pytest.raises(
        LossError, match=rf"1 of 3 .*{name} changed .*; write zo.measure\(lambda {name}={name}: \.\.\.\)"
    ):
        zo.optimizer.step()
    assert same_bits(weights(model), before)
    assert zo.second is not None
    assert not zo.second.kept
    for x in INPUTS:
        zo.measure(lambda x=x: model(x).sum())
        expected.measure(lambda x=x: other(x).sum())
    assert zo.optimizer.step().probes == expected.optimizer.step().probes
    assert same_bits(weights(model), weights(other))


def test_closures_that_change_their_own_variables_and_one_closure_for_each_step_are_none() -> None:
    model, other = Noisy(), Noisy()
    zo, expected, calls, scale = engine(model), engine(other), 0, 1000.0
    for x in INPUTS:

        def loss(x: Tensor = x) -> Tensor:
            nonlocal calls
            calls += 1
            return scale * model(x)  # type: ignore[no-any-return]  # noqa: B023

        zo.measure(loss)
        scale = float("1e3")
        expected.measure(lambda x=x: 1000.0 * other(x))
    assert zo.optimizer.step().as_dict() == expected.optimizer.step().as_dict()
    assert calls == 3 * 5 + 1
    for x in INPUTS:
        method = Method(lambda: model(x))  # noqa: B023
        assert zo.step(method.measure).as_dict() == expected.step(partial(other, x)).as_dict()
        assert method.calls == 5
    assert same_bits(weights(model), weights(other))


# Everywhere the same


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"dropout": True},
    "normalised, 2 directions": {"normalise": True, "num_probes": 2},
    "low rank": {"noise": "low_rank"},
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_resident_and_streamed_runs_are_equal(settings: dict[str, Any], tmp_path: Path) -> None:
    found = []
    for place in (*PLACES, {"offload": "cpu", "device_memory": "10KB"}):
        model = tiny("llama", layers=3) if not settings.get("dropout") else Noisy()
        zo = engine(model, **settings, **place)
        torch.manual_seed(5)
        records = []
        for step in range(4):
            if isinstance(model, Noisy):
                zo.measure_all([partial(model, x) for x in INPUTS])
            else:
                zo.measure_all([closure("llama", model, step), closure("llama", model, step + 1)])
                zo.measure(closure("llama", model, step + 2))
            records.append(zo.optimizer.step().as_dict())
        found.append((records, finished(zo, model)))
    for records, values in found[1:]:
        assert records == found[0][0]
        assert same_bits(values, found[0][1])


def test_a_streamed_model_is_swept_as_often_in_the_second_round_as_in_the_first() -> None:
    model = tiny("llama", layers=4)
    zo = engine(model, offload="cpu")
    assert zo.streaming is not None
    losses = [closure("llama", model, index) for index in range(4)]
    zo.step(losses[0])
    sweeps = []
    sweep = zo.streaming.sweep
    zo.streaming.sweep = lambda: sweeps.append(1) or sweep()  # type: ignore[method-assign]
    zo.measure_all(losses)
    zo.optimizer.step()
    assert len(sweeps) == 2
    for loss in losses[:3]:  # apart, because there is no memory for the activations of all
        zo.measure(loss)
    zo.optimizer.step()
    assert len(sweeps) == 2 + 2 * 3
    zo.close()


def test_closures_that_begin_to_draw_are_measured_apart() -> None:
    model = tiny("llama")
    zo = engine(model, offload="cpu")
    draws, seen = [False], []

    def drawing(index: int) -> Tensor:
        loss = closure("llama", model, index)()
        seen.append((index, torch.rand(()).item() if draws[0] else 0.0, getattr(model, "last", None)))
        if draws[0]:
            model.last = loss.item()
        return loss

    for step in range(3):
        draws[0] = step == 2
        seen.clear()
        zo.measure_all([partial(drawing, 0), partial(drawing, 1)])
        first = seen[-4:]
        seen.clear()
        zo.optimizer.step()
    assert first == [first[0], first[0], first[3], first[3]]
    assert first[0] != first[3]
    assert seen == [first[0]] * 3 + [first[3]] * 3
    zo.close()


def test_stacked_probes_choose_as_separate_ones_do() -> None:
    found = []
    for stack in (False, True):
        model = tiny("llama").double()
        zo = engine(model, noise="low_rank", stack_probes=stack)
        records = [zo.step(closure("llama", model, step)) for step in range(6)]
        assert not stack or zo.oracle.stacking  # type: ignore[union-attr]
        found.append([record.probes[0].coefficient for record in records])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_stacked_vectors_round_as_their_updates_do(dtype: torch.dtype) -> None:
    theta = torch.linspace(-1, 1, 5000).to(dtype)
    both = Direction(Rademacher(), "a", ((3, 1e-4), (4, -1e-4)), rounding_seed=7)
    stacked = stacked_values(theta, Alternatives.of(both))
    for found, term in zip(stacked, both.terms, strict=True):
        assert torch.equal(found, replace(both, terms=(term,)).add_to(theta.clone()))
        assert not torch.equal(found, theta)


@PLACE
@pytest.mark.parametrize("settings", [{}, {"normalise": True, "lr": 0.1, "brake": "rollback"}], ids=["plain", "braked"])
def test_a_log_replays_without_measuring(settings: dict[str, Any], place: dict[str, Any], tmp_path: Path) -> None:
    model = tiny("llama")
    zo = engine(model, **settings, **place)
    log = SeedLogWriter.attach(zo, tmp_path / "log.zo")
    for step in range(10):
        zo.measure_all([closure("llama", model, step), closure("llama", model, step + 1)])
        zo.optimizer.step()
    log.close()
    trained = finished(zo, model)
    assert {entry.coefficients[0] == 0.0 for entry in SeedLog.read(tmp_path / "log.zo").steps} == {True, False}
    base = tiny("llama")
    replay(base, tmp_path / "log.zo")
    assert same_bits(weights(base), trained)


def test_a_checkpoint_continues_bit_for_bit() -> None:
    whole, half = tiny("mlp"), tiny("mlp")
    settings: dict[str, Any] = {"normalise": True, "lr": 1e-3}
    zo = engine(whole, **settings)
    expected = [zo.step(closure("mlp", whole, step)).as_dict() for step in range(8)]
    first = engine(half, **settings)
    for step in range(4):
        first.step(closure("mlp", half, step))
    second = engine(half, **settings)
    second.load_state_dict(first.state_dict())
    assert [second.step(closure("mlp", half, step)).as_dict() for step in range(4, 8)] == expected[4:]
    assert same_bits(weights(half), weights(whole))


def test_a_search_counts_the_forwards_of_both_rounds() -> None:
    model = tiny("mlp")
    calls = []

    def loss() -> Tensor:
        calls.append(1)
        return closure("mlp", model)()

    zo = ZeroOrder(model, lr=LR, estimator="conservative")
    values = weights(model)
    zo.suggest_lr([loss], forwards=200)
    assert len(calls) <= 200
    assert same_bits(weights(model), values)


# Settings


def test_rules_whose_steps_depend_on_more_than_the_estimate_are_refused() -> None:
    for rule in ("momentum", "sign"):
        with pytest.raises(ConfigError, match=f"with rule='{rule}' .*; write rule='sgd'"):
            ZeroOrder(tiny("mlp"), estimator="conservative", rule=rule)
    model = tiny("mlp")
    with pytest.raises(ConfigError, match="rule='torch'"):
        ZeroOrder(model, estimator="conservative", optimizer=torch.optim.Adam(model.parameters()))
    zo = engine(model)
    with pytest.raises(AttributeError, match="rule='sgd' is fixed"):
        zo.rule = Momentum(0.9)
    assert zo.rule.name == "sgd"


def test_stacked_probes_take_one_direction() -> None:
    with pytest.raises(ConfigError, match="write num_probes=1, or leave out stack_probes"):
        ZOConfig(estimator="conservative", noise="low_rank", stack_probes=True, num_probes=2)
    ZOConfig(estimator="conservative", noise="low_rank", stack_probes=True)
