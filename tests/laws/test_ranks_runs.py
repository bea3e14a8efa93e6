"""Laws of longer runs of several processes: data that ends, optimizers, readers of weights, and memory."""

from __future__ import annotations

import gc
import math
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import closure, tiny
from rank_runs import State, both, equal, loss, model_of, state
from torch import nn

from zo_core import ConfigError, RanksError, ZeroOrder, ZOOptimizer
from zo_core.brake.state import History
from zo_core.curves import Curves
from zo_core.seedlog import SeedLogWriter


def test_all_processes_go_back_to_the_same_step(tmp_path: Path) -> None:
    def work(rank: int) -> tuple[list[int], State]:
        model = model_of()
        zo, found = ZeroOrder(model, lr=1e-2, brake="rollback"), []
        for step in range(30):
            if step == 23 and rank == 0:
                SeedLogWriter.attach(zo, tmp_path / "seedlog.zo")  # steps before it cannot be reverted
            record = zo.step(lambda step=step: loss(model, rank, step) + 50.0 * (step in (24, 25, 26)))  # type: ignore[misc]
            found += [] if record.rollback is None else [record.rollback.to]
        return found, state(model)

    first, second = both(tmp_path, work)
    assert first[0] == second[0] == [23]
    assert equal(first[1], second[1])


def test_a_process_without_a_batch_left_ends_the_loop_of_all(tmp_path: Path) -> None:
    def work(rank: int) -> tuple[int, State]:
        model = model_of()
        zo = ZeroOrder(model, lr=1e-2)
        for step in zo.batches(range(3 + 2 * (1 - rank))):
            zo.step(lambda step=step: loss(model, rank, step))  # type: ignore[misc]
        return zo.step_count, state(model)

    first, second = both(tmp_path, work)
    assert first[0] == second[0] == 3
    assert equal(first[1], second[1])


def test_data_that_one_process_cannot_read_is_an_error_on_all(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        def broken() -> Iterator[int]:
            yield 0
            if rank == 1:
                raise OSError("part-3.parquet is damaged")
            yield 1

        model = model_of()
        zo = ZeroOrder(model, lr=1e-2)
        for step in zo.batches(broken()):
            zo.step(lambda step=step: loss(model, rank, step))  # type: ignore[misc]

    first, second = both(tmp_path, work)
    assert (first.kind, second.kind) == (RanksError, OSError)
    assert "rank 1 raised OSError: part-3.parquet is damaged" in first.text


@pytest.mark.slow
def test_a_process_that_leaves_the_loop_is_named_at_once(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        model = model_of()
        zo = ZeroOrder(model, lr=1e-2)
        for step in range(3 + rank):
            zo.step(lambda step=step: loss(model, rank, step))  # type: ignore[misc]

    first, second = both(tmp_path, work, timeout=100)
    assert first is None
    assert second.kind is RanksError
    assert "rank 0 has ended" in second.text or "perhaps rank 0, has ended" in second.text
    assert "zo.batches(loader)" in second.text


@pytest.mark.parametrize("kind", ["batch", "dropout"])
def test_points_need_the_same_data(tmp_path: Path, kind: str) -> None:
    def work(rank: int) -> None:
        model = nn.Sequential(model_of(), nn.Dropout(0.5))
        torch.manual_seed(rank if kind == "dropout" else 0)
        zo = ZeroOrder(model, lr=1e-2, ranks="points", dropout=True)
        zo.step(lambda: loss(model, rank if kind == "batch" else 0, 0))

    for found in both(tmp_path, work):
        assert found.kind is RanksError
        assert "ranks='points' needs the same batch in every process" in found.text


def test_lengths_of_runs_have_to_agree(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        model = model_of()
        zo = ZeroOrder(model, lr=1e-2)
        zo.agree_on({"steps of the run": 12 - rank})
        zo.step(lambda: loss(model, rank, 0))

    for found in both(tmp_path, work):
        assert found.kind is ConfigError
        assert "steps of the run=11 on rank 1, and steps of the run=12 on rank 0" in found.text


@pytest.mark.parametrize("name", ["lr", "weight_decay", "second group"])
def test_rates_that_part_are_an_error_one_step_later(tmp_path: Path, name: str) -> None:
    def work(rank: int) -> tuple[list[int], str]:
        model = model_of()
        found: list[int] = []
        groups: list[dict[str, Any]] = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
        zo = ZeroOrder(model, optimizer=ZOOptimizer(groups, lr=1e-2, weight_decay=0.1))
        zo.listeners.append(lambda record: found.append(record.step))
        for step in range(5):
            if step == 2 and rank:
                which = zo.optimizer.param_groups[1 if name == "second group" else 0]
                which["weight_decay" if name == "weight_decay" else "lr"] *= 2
            try:
                zo.step(lambda step=step: loss(model, rank, step))  # type: ignore[misc]
            except RanksError as error:
                return found, str(error)
        return found, "nothing"

    for steps, said in both(tmp_path, work):
        assert steps == [0, 1, 2]
        assert "rank 1 and rank 0 applied different updates in the step before this one" in said
        assert "set the same learning rates and weight decay in all" in said


def test_rates_of_a_skipped_step_may_differ_and_last_bits_may(tmp_path: Path) -> None:
    def work(rank: int) -> State:
        model = model_of()
        zo = ZeroOrder(model, lr=1e-2)
        for step in range(4):
            if step and rank:
                zo.lr = 2e-2 if step == 1 else math.nextafter(1e-2, 1.0)
            zo.step(lambda step=step: loss(model, rank, step) * (float("nan") if step == 1 else 1.0))  # type: ignore[misc]
        return state(model)

    first, second = both(tmp_path, work)
    assert equal(first, second)
    assert not equal(first, state(model_of()))


# Optimizers, readers, memory


@pytest.mark.parametrize("name", ["AdamW", "Adafactor"])
def test_torch_optimizers_are_those_of_one_process(tmp_path: Path, name: str) -> None:
    def engine(count: int = 1) -> tuple[nn.Module, ZeroOrder]:
        model = model_of()
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=1e-3)
        return model, ZeroOrder(model, optimizer=optimizer, num_probes=count, normalise=False)

    def work(rank: int) -> State:
        model, zo = engine()
        for step in range(6):
            zo.step(lambda step=step: loss(model, rank, step))  # type: ignore[misc]
        return state(model)

    first, second = both(tmp_path, work)
    model, zo = engine(2)
    zo.first_steps = None
    for step in range(6):
        calls = iter([0, 0, 1, 1])
        zo.step(lambda step=step, calls=calls: loss(model, next(calls), step))  # type: ignore[misc]
    assert equal(first, second)
    assert equal(first, state(model))
    assert not equal(first, state(model_of()))


@pytest.mark.parametrize(
    "settings", [{"noise": "low_rank"}, {"offload": "cpu"}, {"offload": "disk", "rule": "momentum"}]
)
def test_reading_weights_in_one_process_changes_nothing(tmp_path: Path, settings: dict[str, Any]) -> None:
    def work(rank: int) -> tuple[list[State], State]:
        model, read = tiny("llama"), []
        zo = ZeroOrder(model, lr=1e-3, **settings)
        if rank == 0:
            zo.listeners.append(lambda record: read.append(state(model)) if record.step % 2 else None)
        for step in range(5):
            zo.step(lambda step=step: closure("llama", model, step)() * (1 + rank))  # type: ignore[misc]
        zo.close()
        return read, state(model)

    first, second = both(tmp_path, work)
    assert equal(first[1], second[1])
    assert len(first[0]) == 2
    assert not equal(first[0][0], first[0][1])


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["spsa", "conservative"])
def test_many_steps_leave_nothing_behind(tmp_path: Path, estimator: str) -> None:
    def work(rank: int) -> int:
        model = nn.Linear(3, 1)
        zo, row = ZeroOrder(model, lr=1e-6, estimator=estimator, brake=None), torch.ones(2, 3)

        def held_after(steps: int) -> int:
            for _ in range(steps):
                zo.step(lambda: (model(row) - rank).square().mean())
            # Kept by design: the last 20,000 updates, which the brake may revert, and 512 points of the report.
            zo.braking.history, zo.curves = History(zo.step_count), Curves()
            gc.collect()
            others = [tracemalloc.Filter(False, tracemalloc.__file__)]
            return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces(others).traces)

        tracemalloc.start()
        held = [held_after(300) for _ in range(3)]
        # Python's free lists fill and empty by some kilobytes; what every step leaves is in both differences.
        return min(held[1] - held[0], held[2] - held[1])

    assert max(both(tmp_path, work, seconds=280)) < 10_000  # 33 bytes a step
