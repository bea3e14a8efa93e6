"""Laws of several processes: all hold the same bits, and these are the bits that one process would compute."""

from __future__ import annotations

import os
import signal
import time
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import closure, tiny
from processes import together
from rank_runs import State, accumulate, both, equal, loss, model_of, state
from torch import Tensor

from zo_core import ConfigError, RanksError, StateError, ZeroOrder
from zo_core.ranks import LOSSES
from zo_core.seedlog import SeedLog, SeedLogWriter, replay

STEPS = 4


def run(rank: int, *, same_batch: bool = False, steps: int = STEPS, **settings: Any) -> list[State]:
    """The weights after every step."""
    model, found = model_of(), []
    zo = ZeroOrder(model, **{"lr": 1e-2, **settings})
    for step in range(steps):
        zo.step(lambda step=step: loss(model, 0 if same_batch else rank, step))  # type: ignore[misc]
        with zo.effective():
            found.append(state(model))
    zo.close()
    return found


SETTINGS = [
    *({"ranks": mode, "estimator": name} for mode, name in product(("directions", "data", "points"), ("spsa", "fzoo"))),
    *({"ranks": mode, "estimator": "conservative"} for mode in ("directions", "data", "points")),
    *({"ranks": mode, "estimator": "forward_grad"} for mode in ("directions", "points")),
    *({"noise": noise, "weight_decay": 0.1} for noise in ("one_block", "coordinates")),
    *({"rule": rule} for rule in ("momentum", "sign")),
    *({"noise": noise} for noise in ("gaussian", "sparse", "low_rank", {"name": "sampled", "share": 0.5})),
    {"noise": "low_rank", "stack_probes": True, "num_probes": 2},
    {"lr": None},
    {"lr": None, "ranks": "data"},
    {"normalise": True, "num_probes": 2},
]


def test_all_processes_hold_the_same_bits_after_every_step(tmp_path: Path) -> None:
    def work(rank: int) -> list[list[State]]:
        return [run(rank, same_batch=settings.get("ranks") == "points", **settings) for settings in SETTINGS]

    first, *others = together(work, tmp_path, size=2)
    for settings, mine, *theirs in zip(SETTINGS, first, *others, strict=True):
        assert not equal(mine[-1], state(model_of())), f"{settings} moved nothing"
        for other in theirs:
            assert all(equal(a, b) for a, b in zip(mine, other, strict=True)), settings


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("rule", ["sgd", "momentum"])
def test_directions_are_those_of_one_process_that_measures_all_of_them(tmp_path: Path, size: int, rule: str) -> None:
    found = together(lambda rank: run(rank, num_probes=2, rule=rule), tmp_path, size=size)
    model = model_of()
    zo = ZeroOrder(model, lr=1e-2, rule=rule, num_probes=2 * size)
    zo.first_steps = None
    for step in range(STEPS):
        calls = iter([rank for rank in range(size) for _ in range(4)])
        zo.step(lambda step=step, calls=calls: loss(model, next(calls), step))  # type: ignore[misc]
        assert all(equal(each[step], state(model)) for each in found)


def test_data_is_one_process_that_accumulates(tmp_path: Path) -> None:
    found = together(lambda rank: run(rank, ranks="data", num_probes=2), tmp_path)
    model = model_of()
    zo = ZeroOrder(model, lr=1e-2, num_probes=2)
    for step in range(STEPS):
        accumulate(zo, model, step)
        assert all(equal(each[step], state(model)) for each in found)


@pytest.mark.parametrize("size", [2, 3])
def test_points_are_those_of_one_process(tmp_path: Path, size: int) -> None:
    found = together(lambda rank: run(rank, ranks="points", num_probes=2, same_batch=True), tmp_path, size=size)
    alone = run(0, num_probes=2)
    assert all(equal(a, b) for each in found for a, b in zip(each, alone, strict=True))


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_streamed_processes_are_resident_ones(tmp_path: Path, name: str, offload: str) -> None:
    def work(rank: int) -> list[State]:
        found = []
        for where in (None, offload):
            model = tiny(name)
            zo = ZeroOrder(model, lr=1e-3, offload=where, noise="low_rank" if name == "t5" else "rademacher")
            for _ in range(STEPS):
                zo.step(lambda model=model: closure(name, model)() * (1 + rank))  # type: ignore[misc]
            zo.close()
            found.append(state(model))
        return found

    (resident, streamed), other = together(work, tmp_path)
    assert equal(resident, streamed)
    assert all(equal(resident, each) for each in other)


def test_the_log_of_rank_0_replays_on_one_process(tmp_path: Path) -> None:
    def work(rank: int) -> State:
        model = model_of()
        zo = ZeroOrder(model, lr=None, num_probes=2)
        if rank == 0:
            SeedLogWriter.attach(zo, tmp_path / "seedlog.zo")
        for step in range(STEPS):
            zo.step(lambda step=step: loss(model, rank, step))  # type: ignore[misc]
        return state(model)

    first, second = together(work, tmp_path)
    model = model_of()
    replay(model, tmp_path / "seedlog.zo")
    assert equal(first, second)
    assert equal(first, state(model))


def test_one_of_several_processes_can_replay(tmp_path: Path) -> None:
    zo = ZeroOrder(model_of(), lr=1e-2, num_probes=2)
    log = SeedLogWriter.attach(zo, tmp_path / "seedlog.zo")
    for step in range(STEPS):
        zo.step(lambda step=step: loss(zo.model, 0, step))  # type: ignore[misc]
    log.close()

    def work(rank: int) -> State:
        model = model_of()
        if rank == 0:
            with pytest.MonkeyPatch.context() as patched:  # as under nccl, where a group over gloo is made by all
                patched.setattr(dist, "get_backend_config", lambda: "cuda:nccl")
                replay(model, tmp_path / "seedlog.zo")
        return state(model)

    first, second = together(work, tmp_path, timeout=10)
    assert equal(first, state(zo.model))
    assert equal(second, state(model_of()))


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_continues_with_another_number_of_processes(
    tmp_path: Path, before: int, after: int, caplog: pytest.LogCaptureFixture
) -> None:
    def work(rank: int) -> State:
        model, file = model_of(), tmp_path / "checkpoint.pt"
        zo = ZeroOrder(model, lr=1e-2, rule="momentum", num_probes=2)
        if file.exists():
            weights, run = torch.load(file, weights_only=True)
            model.load_state_dict(weights)
            zo.load_state_dict(run)
        begun = zo.step_count
        if rank == 0:
            SeedLogWriter.attach(zo, tmp_path / "seedlog.zo", follow=begun > 0)
        for step in range(begun, begun + STEPS):
            zo.step(lambda step=step: loss(model, rank, step))  # type: ignore[misc]
        if rank == 0 and not begun:
            torch.save((model.state_dict(), zo.state_dict()), file)
        return state(model)

    for index, size in enumerate((before, after)):
        found = together(work, tmp_path / str(index), size=size) if size > 1 else [work(0)]
        assert all(equal(each, found[0]) for each in found)
    model = model_of()
    replay(model, tmp_path / "seedlog.zo")
    assert equal(model.state_dict(), found[0])
    counts = [len(step.probes) for step in SeedLog.read(tmp_path / "seedlog.zo").steps]
    assert counts == [2 * before] * STEPS + [2 * after] * STEPS
    said = [line for line in caplog.messages if "from step 4 on a step has 2 directions instead of 4" in line]
    assert len(said) == (after == 1)


#: With "points" and a third point, one process measures two points of a step and the other one.
SEARCHES: list[dict[str, Any]] = [{"normalise": False}, {"normalise": "curvature", "ranks": "points"}]


@pytest.mark.parametrize("settings", SEARCHES)
def test_all_processes_find_the_same_rate(tmp_path: Path, settings: dict[str, Any]) -> None:
    def work(rank: int) -> tuple[float, State]:
        model = model_of()
        zo = ZeroOrder(model, **settings)
        data = 0 if zo.config.ranks == "points" else rank
        batches = [lambda step=step: loss(model, data, step) for step in range(4)]
        found = zo.suggest_lr(batches, forwards=200)
        return found.lr, state(model)

    first, second = together(work, tmp_path)
    assert first[0] == second[0]
    assert equal(first[1], state(model_of()))


# Faults


def test_an_exception_on_one_process_reaches_all_of_them_and_the_run_can_go_on(tmp_path: Path) -> None:
    def work(rank: int) -> tuple[str, State, State, State]:
        model = model_of()
        zo = ZeroOrder(model, lr=1e-2)
        zo.step(lambda: loss(model, rank, 0))
        before, said = state(model), ""

        def fails() -> Tensor:
            if rank == 1:
                raise ValueError("no such file: part-3.parquet")
            return loss(model, rank, 1)

        try:
            zo.step(fails)
        except (ValueError, RanksError) as error:
            said = f"{type(error).__name__}: {error}"
        middle = state(model)
        zo.step(lambda: loss(model, rank, 1))
        return said, before, middle, state(model)

    first, second = both(tmp_path, work)
    assert first[0].startswith("RanksError")
    assert "rank 1 raised ValueError: no such file: part-3.parquet" in first[0]
    assert second[0].startswith("ValueError")
    assert equal(first[1], first[2])
    assert equal(second[1], second[2])
    assert equal(first[3], second[3])
    assert not equal(first[3], first[1])


def test_an_exception_during_the_search_for_a_rate_reaches_all(tmp_path: Path) -> None:
    def work(rank: int) -> str:
        model, calls = model_of(), []

        def fails() -> Tensor:
            calls.append(1)
            if rank == 1 and len(calls) > 5:
                raise ValueError("broken")
            return loss(model, rank, 1)

        try:
            ZeroOrder(model, normalise=False).suggest_lr([fails] * 4, forwards=200)
        except (ValueError, RanksError) as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    first, second = both(tmp_path, work)
    assert "rank 1 raised ValueError: broken" in first
    assert second == "ValueError: broken"


@pytest.mark.parametrize("how", ["killed", pytest.param("hangs", marks=pytest.mark.slow)])
def test_a_process_that_is_gone_is_named(tmp_path: Path, how: str) -> None:
    def work(rank: int) -> tuple[str, State, State]:
        model = model_of()
        zo = ZeroOrder(model, lr=1e-2)
        zo.step(lambda: loss(model, rank, 0))
        before = state(model)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        with pytest.raises(RanksError) as error:
            zo.step(lambda: loss(model, rank, 1))
        if how == "hangs":
            os.kill(os.getppid(), 0)
        return str(error.value), before, state(model)

    if how == "hangs":
        with pytest.raises(AssertionError, match="1 of 2 processes did not end"):
            together(work, tmp_path, seconds=30, timeout=5)
        found = torch.load(tmp_path / "rank0.pt", weights_only=False)
    else:
        found, nothing = both(tmp_path, work)
        assert nothing is None
    assert "rank 1 has ended or does not answer" in found[0]
    assert equal(found[1], found[2])


def test_an_interrupt_between_the_parts_of_an_exchange_leaves_it_whole(tmp_path: Path) -> None:
    def work(rank: int) -> tuple[str, State]:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
        model = model_of()
        zo = ZeroOrder(model, lr=1e-2)
        zo.step(lambda: loss(model, rank, 0))
        headers = zo.exchange._headers

        def interrupted(kind: int, number: int) -> list[list[int]]:
            found: list[list[int]] = headers(kind, number)
            if rank == 1 and kind == LOSSES:
                zo.exchange._headers = headers
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.2)
            return found

        zo.exchange._headers = interrupted
        try:
            for step in (1, 2):
                zo.step(lambda step=step: loss(model, rank, step))  # type: ignore[misc]
        except (KeyboardInterrupt, RanksError) as error:
            return f"{type(error).__name__}: {error}", state(model)
        return "nothing", state(model)

    first, second = both(tmp_path, work)
    whole = together(lambda rank: run(rank, steps=2), tmp_path / "whole")
    assert first[0].startswith("RanksError")
    assert "rank 1 raised KeyboardInterrupt" in first[0]
    assert second[0].startswith("KeyboardInterrupt")
    assert equal(first[1], whole[0][1])  # the losses of the step have come, and those of the next one never do
    assert equal(second[1], whole[1][0])


def test_what_is_not_finite_on_one_process_is_a_skipped_step_on_all(tmp_path: Path) -> None:
    def work(rank: int) -> tuple[list[str | None], State]:
        model = model_of()
        zo = ZeroOrder(model, lr=1e-2)
        records = [
            zo.step(lambda step=step: loss(model, rank, step) * (float("nan") if step == rank == 1 else 1.0))
            for step in range(3)
        ]
        return [record.skipped for record in records], state(model)

    first, second = both(tmp_path, work)
    assert first[0] == second[0]
    assert [bool(reason) for reason in first[0]] == [False, True, False]
    assert equal(first[1], second[1])


# What has to be common


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"lr": 2e-2}, "lr=0.02 on rank 1, and lr=0.01 on rank 0"), ({"seed": 3}, "seed=3 on rank 1")],
)
def test_different_settings_are_an_error_on_all(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    for found in both(tmp_path, lambda rank: run(rank, **(settings if rank else {}))):
        assert found.kind is ConfigError
        assert words in found.text


def test_other_weights_are_those_of_rank_0(tmp_path: Path) -> None:
    def work(rank: int) -> State:
        model = model_of(seed=rank)
        ZeroOrder(model, lr=0.0).step(lambda: loss(model, rank, 0))
        return state(model)

    for found in both(tmp_path, work):
        assert equal(found, state(model_of()))


def test_other_streamed_weights_are_an_error(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        model = tiny("llama")
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight += rank
        ZeroOrder(model, lr=0.0, offload="cpu").step(closure("llama", model))

    for found in both(tmp_path, work):
        assert found.kind is StateError
        assert "different weights in" in found.text


def test_processes_at_different_steps_are_an_error_on_all(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        model = model_of()
        zo = ZeroOrder(model, lr=1e-2)
        zo.step(lambda: loss(model, rank, 0))
        zo.at(5 if rank else 1)
        zo.step(lambda: loss(model, rank, 0))

    for found in both(tmp_path, work):
        assert found.kind is RanksError
        assert "rank 1 is at step 5, and rank 0 at step 1" in found.text


def test_more_processes_than_points_is_an_error(tmp_path: Path) -> None:
    for found in together(lambda rank: run(rank, ranks="points", same_batch=True), tmp_path, size=3):
        assert found.kind is ConfigError
        assert "ranks='points' deals 2 points a step to 3 processes" in found.text


def test_processes_can_train_models_of_their_own(tmp_path: Path) -> None:
    first, second = together(lambda rank: run(rank, ranks=None)[-1], tmp_path)
    assert not equal(first, second)
    assert equal(first, run(0)[-1])
