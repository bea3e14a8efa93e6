"""Laws of backprop in several processes: all hold the same bits, and these are what one process would compute."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from models import closure, tiny
from processes import Raised, together
from rank_runs import State, accumulate, equal, loss, model_of, state
from torch import Tensor, nn

from zo_core import ConfigError, QueryError, RanksError, ZeroOrder, ZOConfig
from zo_core.exchange import Exchange
from zo_core.placement import backprop_of
from zo_core.ranks import Ranks

STEPS = 4
HOW = {"lr": 1e-2, "backprop": ("2",), "backprop_lr": 1e-2}


def run(rank: int, **settings: Any) -> list[State]:
    """The weights after every step."""
    model, found = model_of(), []
    zo = ZeroOrder(model, **{**HOW, **settings})
    assert zo.backprop is not None
    zo.backprop.bound(0.05)
    for step in range(STEPS):
        zo.step(lambda step=step: loss(model, rank, step))  # type: ignore[misc]
        found.append(state(model))
    return found


def test_data_is_one_process_that_accumulates(tmp_path: Path) -> None:
    found = together(lambda rank: run(rank, ranks="data", num_probes=2), tmp_path)
    model = model_of()
    zo = ZeroOrder(model, **HOW, num_probes=2)
    assert zo.backprop is not None
    zo.backprop.bound(0.05)
    for step in range(STEPS):
        accumulate(zo, model, step)
        assert all(equal(each[step], state(model)) for each in found)


@pytest.mark.parametrize("size", [2, 3])
def test_points_are_those_of_one_process(tmp_path: Path, size: int) -> None:
    found = together(lambda _: run(0, ranks="points", num_probes=2), tmp_path, size=size)
    alone = run(0, num_probes=2)
    assert all(equal(a, b) for each in found for a, b in zip(each, alone, strict=True))


def test_directions_of_several_processes_take_the_mean_of_their_gradients(tmp_path: Path) -> None:
    """The forward-only part stands still, so that the other is AdamW on the mean loss of all batches."""
    found = together(lambda rank: run(rank, lr=0.0), tmp_path, size=3)
    model = model_of()
    model[0].requires_grad_(False)
    adamw = torch.optim.AdamW(model[2].parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(STEPS):
        adamw.zero_grad()
        (sum(loss(model, rank, step) for rank in range(3)) / 3).backward()  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_(model[2].parameters(), 0.05)
        adamw.step()
        assert equal(found[0][step], found[1][step])
        assert equal(found[0][step], found[2][step])
        for name, value in state(model).items():
            torch.testing.assert_close(found[0][step][name], value)


def test_all_processes_hold_the_same_bits_also_with_streamed_layers(tmp_path: Path) -> None:
    names = ("lm_head", "model.norm", "model.layers.1")

    def work(rank: int) -> list[State]:
        found = []
        for where in (None, "cpu"):
            model = tiny("llama", tied=False)
            zo = ZeroOrder(model, lr=1e-3, offload=where, backprop=names, backprop_lr=1e-2)
            for step in range(STEPS):
                zo.step(closure("llama", model, 2 * step + rank))
            zo.close()
            found.append(state(model))
        return found

    first, *others = chain(*together(work, tmp_path))
    assert all(equal(first, each) for each in others)


class Experts(nn.Module):
    """Of the modules under backprop, each process uses another one, and none uses the last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 4), nn.ModuleList(nn.Linear(4, 1) for _ in range(3))

    def forward(self, rank: int) -> Tensor:
        return self.head[rank](self.body(torch.ones(2, 4))).square().mean()


def test_weights_that_only_some_processes_use_move_in_all(tmp_path: Path) -> None:
    def work(rank: int) -> State:
        model = Experts()
        zo = ZeroOrder(model, lr=1e-3, backprop=("head",), weight_decay=0.5)
        zo.step(lambda: model(rank))
        return state(model)

    first, second = together(work, tmp_path)
    before = state(Experts())
    assert equal(first, second)
    assert [name for name in before if torch.equal(before[name], first[name])] == ["head.2.weight", "head.2.bias"]


@pytest.mark.parametrize("kind", ["query", "nan"])
def test_a_step_that_one_process_skips_moves_neither_part_in_any(tmp_path: Path, kind: str) -> None:
    def work(rank: int) -> list[State]:
        model, found = model_of(), []
        zo = ZeroOrder(model, **HOW)

        def measured(step: int) -> Tensor:
            if rank == step == 1 and kind == "query":
                raise QueryError("no answer")
            return loss(model, rank, step) * (float("nan") if rank == step == 1 else 1.0)

        for step in range(3):
            zo.step(lambda step=step: measured(step))  # type: ignore[misc]
            found.append(state(model))
        return found

    first, second = together(work, tmp_path)
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))
    assert equal(first[0], first[1])
    assert not equal(first[1], first[2])


@pytest.mark.parametrize("mode", ["points", "data"])
def test_a_query_that_fails_in_the_first_step_skips_it_in_all_processes(tmp_path: Path, mode: str) -> None:
    """The first step compares losses between processes, and one whose gradient fails has to answer, too."""

    def work(rank: int) -> tuple[list[str | None], State]:
        model = model_of()
        zo = ZeroOrder(model, **{**HOW, "ranks": mode, "num_probes": 2})

        def measured(step: int) -> Tensor:
            if rank == 1 and step == 0:
                raise QueryError("no answer")
            return loss(model, 0, step)

        return [zo.step(lambda step=step: measured(step)).skipped for step in range(3)], state(model)  # type: ignore[misc]

    first, second = together(work, tmp_path)
    for skipped, _ in (first, second):
        assert skipped[0] is not None
        assert skipped[1:] == [None, None]
    assert equal(first[1], second[1])


def test_an_exception_of_one_process_ends_the_step_of_the_others(tmp_path: Path) -> None:
    def work(rank: int) -> State:
        model = model_of()
        zo = ZeroOrder(model, **HOW)
        with pytest.raises(RanksError if rank == 0 else ZeroDivisionError):
            zo.step(lambda: loss(model, rank, 1 // (1 - rank)))
        return state(model)

    found = together(work, tmp_path)
    assert not any(isinstance(each, Raised) for each in found)
    assert all(equal(each, state(model_of())) for each in found)


def _moments(zo: ZeroOrder) -> None:
    assert zo.backprop is not None
    assert zo.backprop.optimizer is not None
    weight = zo.backprop.weights["2.bias"]
    zo.backprop.optimizer.state[weight] = {"step": torch.tensor(1.0), "exp_avg": weight.detach().clone()}


def _betas(zo: ZeroOrder) -> None:
    zo.backprop.optimizer.param_groups[0]["betas"] = (0.8, 0.999)  # type: ignore[union-attr]


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda zo: zo.backprop.bound(0.5),
            "max_norm of backprop=0.5 on rank",
        ),
        (_betas, "'betas': (0.8, 0.999)"),
        (_moments, "AdamW's moments of 2.bias={"),
    ],
    ids=["norm", "adamw", "moments"],
)
def test_another_norm_adamw_or_moments_are_an_error_on_all(tmp_path: Path, change: Any, words: str, who: int) -> None:
    def work(rank: int) -> None:
        model = model_of()
        zo = ZeroOrder(model, **HOW)
        if rank == who:
            change(zo)
        zo.step(lambda: loss(model, rank, 0))

    for found in together(work, tmp_path):
        assert found.kind is ConfigError
        assert words in found.text


def test_parts_of_one_model_are_refused() -> None:
    exchange: Exchange = Ranks.__new__(Ranks)
    exchange.units, exchange.size = 1, 2  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="hold the parts"):
        backprop_of(ZOConfig(backprop=("2",)), exchange)
