"""Laws of tensor parallel: the gathered weights are those that one process computes from the log."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import Raised, together
from rank_runs import State, equal, loss, model_of
from torch import Tensor, nn

from zo_core import ConfigError, ModelError, RanksError, ZeroOrder, ZOOptimizer
from zo_core.noise.parts import Part
from zo_core.seedlog import SeedLog, SeedLogWriter, replay
from zo_core.targets import held_part

STEPS = 3


def parallel(model: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def mesh_of(*shape: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    names = ("tp",) if len(shape) == 1 else ("zo", "tp")
    return init_device_mesh("cpu", shape, mesh_dim_names=names)["tp"]


def gathered(model: nn.Module) -> State:
    return {name: getattr(value, "full_tensor", value.clone)().clone() for name, value in model.state_dict().items()}


def run(rank: int, mesh: Any, log: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> State:
    model = parallel(model_of().to(dtype), mesh)
    zo = ZeroOrder(model, **{"lr": 1e-2, **settings})
    if rank == 0:
        SeedLogWriter.attach(zo, log)
    data = rank // mesh.size() if zo.config.ranks != "points" else 0
    for step in range(STEPS):
        zo.step(lambda step=step: loss_in(model, data, step, dtype))  # type: ignore[misc]
    return gathered(model)


def loss_in(model: nn.Module, data: int, step: int, dtype: torch.dtype) -> Tensor:
    return loss(model if dtype == torch.float32 else lambda inputs: model(inputs.to(dtype)).float(), data, step)  # type: ignore[arg-type]


SETTINGS: list[dict[str, Any]] = [
    {},
    {"noise": "gaussian", "rule": "momentum", "weight_decay": 0.1, "num_probes": 2},
    {"rule": "sign", "dtype": torch.bfloat16},
    {"rule": "momentum", "dtype": torch.float16, "lr": 0.1},
    {"estimator": "fzoo", "num_probes": 2},
    {"estimator": "es", "num_probes": 4},
    {"estimator": "conservative", "dtype": torch.bfloat16},
    {"noise": {"name": "sampled", "share": 0.5}, "lr": None, "normalise": True},
]


def test_gathered_weights_are_those_of_the_log_on_one_process(tmp_path: Path) -> None:
    def work(rank: int) -> list[State]:
        mesh = mesh_of(2)
        return [run(rank, mesh, tmp_path / f"{i}.zo", **settings) for i, settings in enumerate(SETTINGS)]

    first, second = together(work, tmp_path)
    for index, settings in enumerate(SETTINGS):
        model = model_of().to(settings.get("dtype", torch.float32))
        before = gathered(model)
        replay(model, tmp_path / f"{index}.zo")
        assert equal(first[index], gathered(model)), settings
        assert equal(first[index], second[index])
        assert not equal(first[index], before)


def test_a_log_replays_on_parts_that_one_process_would_replay_in_pieces(tmp_path: Path) -> None:
    def work(rank: int) -> tuple[State, State]:
        mesh = mesh_of(2)
        torch.manual_seed(0)
        start = nn.Sequential(nn.Linear(16, 2100), nn.Tanh(), nn.Linear(2100, 256, bias=False))
        model, again = parallel(copy.deepcopy(start), mesh), parallel(start, mesh)
        zo = ZeroOrder(model, lr=1e-2, noise="gaussian")
        log = SeedLogWriter.attach(zo, tmp_path / f"{rank}.zo")
        zo.step(lambda: model(torch.ones(2, 16)).square().mean())
        log.close()
        dist.barrier()  # only rank 0 writes a log
        replay(again, tmp_path / "0.zo")
        return gathered(model), gathered(again)

    for trained, replayed in together(work, tmp_path):
        assert equal(trained, replayed)


def test_groups_of_processes_share_directions_batches_or_points(tmp_path: Path) -> None:
    modes = "directions", "data", "points"

    def work(rank: int) -> list[State]:
        mesh = mesh_of(2, 2)
        return [run(rank, mesh, tmp_path / f"{mode}.zo", ranks=mode) for mode in modes]

    found = together(work, tmp_path, size=4)
    for index, mode in enumerate(modes):
        model = model_of()
        replay(model, tmp_path / f"{mode}.zo")
        assert all(equal(each[index], gathered(model)) for each in found)
        log = SeedLog.read(tmp_path / f"{mode}.zo")
        assert {len(step.probes) for step in log.steps} == {2 if mode == "directions" else 1}


def test_a_loss_that_differs_within_a_group_is_an_error_on_all(tmp_path: Path) -> None:
    def work(rank: int) -> State:
        model = parallel(model_of(), mesh_of(2))
        zo, before = ZeroOrder(model, lr=1e-2), gathered(model)
        with pytest.raises(RanksError, match="rank 1 and rank 0 hold parts of one model, and have measured"):
            zo.step(lambda: loss(model, 0, 0) * (1.0 + 1e-3 * rank))
        assert equal(before, gathered(model))
        zo.step(lambda: loss(model, 0, 0))
        return gathered(model)

    first, second = together(work, tmp_path)
    assert equal(first, second)


def test_processes_with_the_same_part_need_the_same_values(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        mesh = mesh_of(2, 2)
        model = parallel(model_of(), mesh)
        with torch.no_grad():
            model[0].weight.to_local().add_(rank == 2)
        ZeroOrder(model, lr=1e-2).step(lambda: loss(model, 0, 0))

    for found in together(work, tmp_path, size=4):
        assert isinstance(found, Raised)
        assert "different weights in '0.weight' and 0 other sharded tensors" in found.text


def test_a_step_goes_on_with_a_checkpoint_and_with_frozen_parts(tmp_path: Path) -> None:
    def begun(mesh: Any) -> tuple[nn.Module, ZeroOrder]:
        model = parallel(model_of(), mesh)
        model[0].weight.requires_grad_(False)
        return model, ZeroOrder(model, optimizer=ZOOptimizer(model.parameters(), lr=1e-2), rule="momentum")

    def work(rank: int) -> list[State]:
        mesh = mesh_of(2)
        model, zo = begun(mesh)
        if rank == 0:
            SeedLogWriter.attach(zo, tmp_path / "seedlog.zo")
        for step in range(2):
            zo.step(lambda step=step: loss(model, 0, step))  # type: ignore[misc]
        weights, rest = copy.deepcopy((model.state_dict(), zo.state_dict()))
        zo.step(lambda: loss(model, 0, 2))
        other, again = begun(mesh)
        other.load_state_dict(weights)
        again.load_state_dict(rest)
        again.step(lambda: loss(other, 0, 2))
        return [gathered(model), gathered(other)]

    found = together(work, tmp_path)
    model = model_of()
    model[0].weight.requires_grad_(False)
    replay(model, tmp_path / "seedlog.zo")
    assert all(equal(each, gathered(model)) for both in found for each in both)


def test_a_model_that_is_moved_later_goes_on(tmp_path: Path) -> None:
    def work(rank: int) -> tuple[State, State]:
        model = parallel(model_of(), mesh_of(2))
        zo = ZeroOrder(model, lr=1e-2)
        zo.step(lambda: loss(model, 0, 0))
        model.double()
        before = gathered(model)
        zo.step(lambda: loss_in(model, 0, 1, torch.float64))
        return before, gathered(model)

    (before, first), (_, second) = together(work, tmp_path)
    assert all(not torch.equal(before[name], first[name]) for name in before)
    assert equal(first, second)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"noise": "low_rank"}, "noise='low_rank' needs whole weights"),
    ({"noise": "sparse"}, "noise='sparse' needs whole weights"),
    ({"offload": "cpu"}, "offload='cpu': layers are streamed as a whole"),
    ({"ranks": None}, "ranks=None: each process would train by itself"),
]


def test_what_needs_whole_weights_is_refused(tmp_path: Path) -> None:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    def work(rank: int) -> str:
        mesh = mesh_of(2)
        for settings, words in WRONG:
            with pytest.raises(ConfigError, match="parameter '0.weight' is a DTensor, and " + words):
                ZeroOrder(parallel(model_of(), mesh), lr=1e-2, **settings)
        model = parallel(model_of(), mesh)
        with pytest.raises(ConfigError, match="a torch optimizer holds whole weights"):
            ZeroOrder(model, optimizer=torch.optim.SGD(model.parameters(), lr=1e-2))
        with pytest.raises(ConfigError, match="quantised weights and DTensors"):
            ZeroOrder(model, lr=1e-2).check(lambda: loss(model, 0, 0))
        uneven = distribute_tensor(torch.arange(15.0).view(5, 3), mesh, [Shard(0)])
        held, part = held_part("w", uneven)
        assert torch.equal(held, torch.arange(15.0).view(5, 3)[3 * rank :][:3])
        assert part == Part(torch.Size((5, 3)), (3 * rank, 0), (3 - rank, 3))
        assert held_part("w", distribute_tensor(torch.ones(4), mesh, [Replicate()]))[1] is None
        with pytest.raises(ModelError, match="with the placement P"):
            held_part("w", DTensor.from_local(torch.ones(4), mesh, [Partial()]))
        return "refused"

    assert together(work, tmp_path) == ["refused", "refused"]
