"""Momentum that travels with its block, states that are saved, and runs that go on from them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from models import batch
from offload_helpers import TIERS, in_memory, make

from zo_core import ZeroOrder
from zo_core.streaming import Streaming, move_streamed

pytestmark = pytest.mark.usefixtures("no_probe_thread_is_left")


@pytest.mark.parametrize("tier", TIERS)
def test_momentum_travels_with_its_block(tier: str, tmp_path: Path) -> None:
    model, inputs = make("llama")
    zo = ZeroOrder(model, lr=1e-3, rule="momentum", offload=tier)
    for _ in range(3):
        zo.step(lambda: model(**inputs).loss)
    streamed = [p for p in model.parameters() if p.requires_grad and in_memory(p).isnan().any()]
    assert streamed
    assert all(zo.optimizer.state[p]["momentum"].untyped_storage().nbytes() == 4 for p in streamed)  # one NaN
    twin, _ = make("llama")
    resident = ZeroOrder(twin, lr=1e-3, rule="momentum")
    for _ in range(3):
        resident.step(lambda: twin(**inputs).loss)
    ours, theirs = zo.optimizer.state_dict()["state"], resident.optimizer.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[index]["momentum"], theirs[index]["momentum"]) for index in theirs)
    zo.close()  # brings it back
    for engine, net in ((zo, model), (resident, twin)):
        engine.step(lambda net=net: net(**inputs).loss)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_second_engine_starts_without_the_momentum_of_the_first() -> None:
    model, inputs = make("llama")
    twin, _ = make("llama")
    for _ in range(2):
        zo = ZeroOrder(model, lr=1e-3, rule="momentum", **({"offload": "cpu"} if Streaming.of(model) is None else {}))
        resident = ZeroOrder(twin, lr=1e-3, rule="momentum")
        for _ in range(2):
            zo.step(lambda: model(**inputs).loss)
            resident.step(lambda: twin(**inputs).loss)
    zo.close()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_momentum_is_stored_from_the_memory_it_was_loaded_to(dtype: torch.dtype, monkeypatch: Any) -> None:
    def engine() -> ZeroOrder:
        return ZeroOrder(make("llama", dtype=dtype)[0], lr=1e-3, rule="momentum", offload="cpu")

    first = engine()
    first.step(lambda: first.model(**batch("llama")).loss)
    saved = first.state_dict()
    kept = {id(value) for state in saved["optimizer"]["state"].values() for value in state.values()}
    stored = []
    second = engine()
    load = second.streaming.load_state
    monkeypatch.setattr(second.streaming, "load_state", lambda b, v: (stored.extend(v.values()), load(b, v)))
    second.load_state_dict(saved)
    assert stored
    assert all(id(value) in kept for value in stored)


@pytest.mark.parametrize("tier", TIERS)
def test_a_state_dict_is_whole_and_loading_one_reaches_the_store(tier: str, tmp_path: Path) -> None:
    model, inputs = make("llama")
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    zo = ZeroOrder(model, lr=1e-2, offload=tier)
    zo.step(lambda: model(**inputs).loss)
    moved = model.state_dict()
    assert not any(value.isnan().any() for value in moved.values())
    assert any(not torch.equal(moved[name], fresh[name]) for name in moved)
    model.load_state_dict(fresh)
    assert all(torch.equal(value, fresh[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(**inputs).loss, make("llama")[0].eval()(**inputs).loss)


@pytest.mark.parametrize("tier", TIERS)
def test_saving_and_resuming_continues_bit_for_bit(tier: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"lr": 1e-3, "rule": "momentum"}
    model, inputs = make("llama")
    zo = ZeroOrder(model, offload=tier, **settings)
    for step in range(6):
        if step == 3:
            torch.save({"model": model.state_dict(), "zo": zo.state_dict()}, tmp_path / "checkpoint")
        zo.step(lambda: model(**inputs).loss)
    again, _ = make("llama")
    saved = torch.load(tmp_path / "checkpoint")
    other = ZeroOrder(again, offload=tier, **settings)
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["zo"])
    for _ in range(3):
        other.step(lambda: again(**inputs).loss)
    straight = model.state_dict()
    assert all(torch.equal(value, straight[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("rule", ["sgd", "momentum"])
def test_a_streamed_model_goes_on_after_it_was_moved(tier: str, rule: str) -> None:
    ends = []
    for moves in (False, True):
        model, inputs = make("llama")
        zo = ZeroOrder(model, lr=1e-3, rule=rule, offload=tier)
        for step in range(6):
            if moves and step == 3:
                assert zo.streaming is not None
                zo.streaming.compute_on(torch.device("cpu"))
                move_streamed(model, torch.device("cpu"))
            zo.step(lambda model=model, inputs=inputs: model(**inputs).loss)
        zo.close()
        ends.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(map(torch.equal, *ends))


def test_loading_waits_until_the_slot_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The write of the update before it reads the slot in the background."""
    zo = ZeroOrder(make("llama")[0], lr=1e-3, offload="cpu")
    assert zo.streaming is not None
    streaming, write = zo.streaming, zo.streaming.store.write
    block = streaming.blocks[0]
    name = next(iter(block.holders))
    old, new = (torch.full(block.specs[name][0], value) for value in (1.0, 2.0))
    written: list[float] = []

    def slow(where: str, tensors: dict[str, torch.Tensor], changed: set[str]) -> None:
        time.sleep(0.2)
        write(where, tensors, changed)
        written.append(tensors[name].flatten()[0].item())

    monkeypatch.setattr(streaming.store, "write", slow)
    streaming.load_state(block, {name: old})
    streaming.load_state(block, {name: new})
    zo.close()
    assert written == [1.0, 2.0]


def test_making_room_for_momentum_makes_no_arenas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor of momentum makes the slots larger, and one arena after another would be allocated and dropped."""
    made: list[int] = []
    arena = Streaming._arena
    monkeypatch.setattr(Streaming, "_arena", lambda self: made.append(self.slot_bytes) or arena(self))
    model, inputs = make("llama", layers=4)
    zo = ZeroOrder(model, lr=1e-3, offload="cpu", rule="momentum")
    assert made == []
    zo.step(lambda: model(**inputs).loss)
    assert zo.streaming is not None
    assert made == [zo.streaming.slot_bytes] * zo.streaming.slots
    zo.close()
