"""Laws of streamed blocks that the processes of a host share: the same bits as with copies of their own."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from offload_helpers import deep
from processes import together
from torch import Tensor, nn

from zo_core import RanksError, StateError, ZeroOrder
from zo_core.streaming import shared
from zo_core.streaming.shared import SharedStore
from zo_core.streaming.store import DiskStore, RamStore

STEPS = 3
State = dict[str, Tensor]


def state(model: nn.Module) -> State:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def batch(rank: int, step: int) -> dict[str, Tensor]:
    ids = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(100 * rank + step))
    return {"input_ids": ids, "labels": ids}


def loss(model: nn.Module, rank: int, step: int) -> Tensor:
    found: Tensor = model(**batch(rank, step)).loss
    return found


def run(rank: int, where: str | None, **settings: Any) -> dict[str, Any]:
    """A run with all that may happen in between, on one process alone, too; it begins again from its checkpoint."""
    model = deep()[0]
    zo = ZeroOrder(model, lr=1e-2, rule="momentum", offload=where, **settings)
    numbers = []
    for step in range(2 * STEPS):
        if step == STEPS:
            weights, rest = state(model), zo.state_dict()
            model.load_state_dict(state(deep()[0]))
            assert equal(state(model), state(deep()[0]))
            model.load_state_dict(weights)
            zo.load_state_dict(rest)
        zo.step(lambda step=step: loss(model, rank, step))  # type: ignore[misc]
        if step % 3 == 0 and rank == 0:  # on one process alone
            with torch.no_grad():
                numbers.append(float(loss(model, 7, step)))
                numbers.append(float(model.model.layers[2].mlp.up_proj.weight.sum()))
    assert zo.streaming is not None
    store = zo.streaming.store
    kind = type(store)
    whole = isinstance(store, SharedStore) and store.index.keys() == {block.name for block in zo.streaming.blocks}
    rest = zo.state_dict()["optimizer"]["state"]
    momentum = {f"{key}": held["momentum"].clone() for key, held in rest.items()}
    zo.close()
    return {"numbers": numbers, "weights": state(model), "momentum": momentum, "kind": kind, "whole": whole}


def alone(size: int) -> dict[str, Any]:
    model = deep()[0]
    zo = ZeroOrder(model, lr=1e-2, rule="momentum", num_probes=size)
    zo.first_steps = None
    for step in range(2 * STEPS):
        calls = iter([rank for rank in range(size) for _ in range(2)])
        zo.step(lambda step=step, calls=calls: loss(model, next(calls), step))  # type: ignore[misc]
    rest = zo.state_dict()["optimizer"]["state"]
    return {"weights": state(model), "momentum": {f"{key}": held["momentum"] for key, held in rest.items()}}


@pytest.mark.slow
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_shared_blocks_are_own_ones_and_those_of_one_process(tmp_path: Path, where: str) -> None:
    def work(rank: int) -> list[dict[str, Any]]:
        folder = {"offload_dir": str(tmp_path / "blocks")} if where == "disk" else {}
        found = [run(rank, where, **folder)]
        setattr(shared, "host", lambda: None)  # noqa: B010
        return [*found, run(rank, where)]

    first, second = together(work, tmp_path)
    one = alone(2)
    for mine, own in (first, second):
        assert mine["kind"] is SharedStore
        assert mine["whole"]
        assert own["kind"] in (RamStore, DiskStore)
        assert mine["numbers"] == own["numbers"]
        for what in ("weights", "momentum"):
            assert equal(mine[what], own[what])
            assert equal(mine[what], one[what])
    assert first[0]["numbers"]


def test_processes_of_other_hosts_have_blocks_of_their_own(tmp_path: Path) -> None:
    def work(rank: int) -> tuple[bool, State]:
        setattr(shared, "host", lambda: (f"host {rank // 2}", 0, 0))  # noqa: B010
        model = deep()[0]
        zo = ZeroOrder(model, lr=1e-2, offload="cpu")
        for step in range(STEPS):
            zo.step(lambda step=step: loss(model, rank, step))  # type: ignore[misc]
        assert zo.streaming is not None
        return isinstance(zo.streaming.store, SharedStore), state(model)

    found = together(work, tmp_path, size=3)
    assert [each[0] for each in found] == [True, True, False]
    assert all(equal(each[1], found[0][1]) for each in found)


def test_a_host_that_gives_no_memory_leaves_everyone_with_blocks_of_their_own(tmp_path: Path) -> None:
    def work(rank: int) -> tuple[type, State]:
        if rank:

            def refuse(*_: Any) -> int:
                raise PermissionError("not allowed")

            setattr(shared, "mapped_memory", refuse)  # noqa: B010
        model = deep()[0]
        zo = ZeroOrder(model, lr=1e-2, offload="cpu")
        for step in range(STEPS):
            zo.step(lambda step=step: loss(model, rank, step))  # type: ignore[misc]
        assert zo.streaming is not None
        return type(zo.streaming.store), state(model)

    (kind, first), (other, second) = together(work, tmp_path)
    assert kind is other is RamStore
    assert equal(first, second)


def test_processes_that_follow_a_changed_model_share_their_blocks_again(tmp_path: Path) -> None:
    def work(rank: int) -> tuple[bool, State, State]:
        found = []
        for where in ("cpu", None):
            model = deep()[0]
            zo = ZeroOrder(model, lr=1e-2, rule="momentum", offload=where)
            for step in range(2 * STEPS):
                if step == STEPS:
                    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
                zo.step(lambda step=step, model=model: loss(model, rank, step))  # type: ignore[misc]
            if zo.streaming is not None:
                store, names = zo.streaming.store, {block.name for block in zo.streaming.blocks}
                shared = isinstance(store, SharedStore) and store.index.keys() == names
            zo.close()
            found.append(state(model))
        return (shared, *found)

    first, second = together(work, tmp_path)
    assert first[0]
    assert second[0]
    assert all(equal(first[1], each) for each in (first[2], second[1], second[2]))


def test_processes_that_go_on_alone_take_copies_of_their_own(tmp_path: Path) -> None:
    def work(rank: int) -> list[State]:
        found = []
        for where in ("cpu", None):
            model = deep()[0]
            for mode in ("directions", None):
                zo = ZeroOrder(model, lr=1e-2, offload=where, ranks=mode)
                for step in range(STEPS):
                    zo.step(lambda step=step, model=model: loss(model, rank, step))  # type: ignore[misc]
                zo.flush()
            found.append(state(model))
        return found

    first, second = together(work, tmp_path)
    assert equal(*first)
    assert equal(*second)
    assert not equal(first[0], second[0])


# Memory


def proportional(addresses: list[tuple[int, int]]) -> float:
    """The part of some memory that this process has to answer for: pages that the other one has, too, count in half."""
    size = os.sysconf("SC_PAGESIZE")
    pages = {page for begin, count in addresses for page in range(begin // size, (begin + count - 1) // size + 1)}
    found = 0.0
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:  # bit 63: present, 56: of one process
        for page in pages:
            pagemap.seek(8 * page)
            bits = int.from_bytes(pagemap.read(8), "little")
            found += size * (bits >> 63) * (1.0 if bits >> 56 & 1 else 0.5)
    return found


def memory(rank: int) -> float:
    """Bytes of the streamed blocks of this process, momentum included."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(8)))
    zo = ZeroOrder(model, lr=1e-4, rule="momentum", offload="cpu")
    for step in range(2):
        generator = torch.Generator().manual_seed(10 * rank + step)
        inputs = torch.randn(4, 512, generator=generator)
        zo.step(lambda inputs=inputs: model(inputs).square().mean())  # type: ignore[misc]
    zo.flush()
    zo.exchange.average([0.0])
    assert zo.streaming is not None
    held = [t for block in zo.streaming.blocks for t in zo.streaming.stored(block).values()]
    found = proportional([(tensor.data_ptr(), tensor.nbytes) for tensor in held])
    zo.exchange.average([0.0])
    return found


def test_two_processes_need_the_host_memory_of_one(tmp_path: Path) -> None:
    both, one = together(memory, tmp_path / "2"), together(memory, tmp_path / "1", size=1)
    assert one[0] >= 0.9 * 2 * 8 * 512 * 513 * 4
    assert sum(both) <= 1.1 * one[0]


# Faults


def leftovers() -> set[str]:
    found = {f"/dev/shm/{name}" for name in os.listdir("/dev/shm")}
    return found | {str(path) for path in Path(tempfile.gettempdir()).glob("zo-offload-*")}


@pytest.mark.slow
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_a_process_that_is_killed_while_it_writes_is_noticed_and_nothing_is_left(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    before = leftovers()

    def work(rank: int) -> str:
        said = until_killed(rank)
        gc.collect()
        return said

    def until_killed(rank: int) -> str:
        model, said = deep()[0], ""
        zo = ZeroOrder(model, lr=1e-2, offload=where)
        zo.step(lambda: loss(model, rank, 0))

        def killed(*_: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        def skipped(*_: Any) -> None:
            """Leaves the writing to the other process."""

        for kind in (RamStore, DiskStore):
            setattr(kind, "write", killed)  # noqa: B010
        if rank == 0:
            setattr(SharedStore, "write", skipped)  # noqa: B010
        try:
            for step in range(1, 4):
                zo.step(lambda step=step: loss(model, rank, step))  # type: ignore[misc]
        except (StateError, RanksError) as error:
            said = str(error)
        return said

    first, second = together(work, tmp_path)
    assert second is None
    assert "rank 1 has ended" in first or "part of its weights are those of another step" in first
    assert leftovers() == before
