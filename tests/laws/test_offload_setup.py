"""Law: what is streamed is decided once and leaves room to compute; if setting it up fails, the model is as it was."""

from __future__ import annotations

from mmap import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from offload_helpers import LAYERS, deep
from torch import Tensor, nn

from zo_core import ConfigError, StateError, ZeroOrder
from zo_core.noise.hashing import sent
from zo_core.streaming import DiskStore, Streaming, budget, build, move_streamed, offload, streaming
from zo_core.streaming.copies import with_index
from zo_core.streaming.store import RamStore

pytestmark = pytest.mark.usefixtures("no_probe_thread_is_left")

GIB = 1 << 30
CUDA = torch.device("cuda", 0)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return all(torch.equal(after[name], value) for name, value in before.items())


# Failures


@pytest.mark.parametrize(("tier", "store"), [("cpu", RamStore), ("disk", DiskStore)])
def test_a_block_that_cannot_be_stored_leaves_the_model_whole(
    tier: str, store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = deep()
    before, put, calls = values(model), store.put, []

    def failing(self: Any, block: str, tensors: dict[str, Tensor]) -> None:
        calls.append(block)
        if len(calls) == 3:
            raise StateError("no space")
        put(self, block, tensors)

    monkeypatch.setattr(store, "put", failing)
    settings: dict[str, Any] = {"offload_dir": str(tmp_path)} if tier == "disk" else {}
    with pytest.raises(StateError, match="no space"):
        ZeroOrder(model, lr=1e-3, offload=tier, **settings)
    assert Streaming.of(model) is None
    assert same(model, before)
    monkeypatch.undo()
    assert ZeroOrder(model, lr=1e-3).step(lambda: model(**inputs).loss).skipped is None


@pytest.mark.parametrize("tier", ["cpu", "disk"])
def test_a_device_without_room_for_the_rest_leaves_the_model_whole(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = deep()
    before = values(model)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(model, "to", full)
    with pytest.raises(torch.OutOfMemoryError):
        offload(model, tier, device=torch.device("cpu"))
    assert Streaming.of(model) is None
    assert same(model, before)
    with torch.no_grad():
        assert bool(model(**inputs).loss.isfinite())


def test_storing_a_model_does_not_hold_it_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for the driver is a copy of the parameters', which are released block by block."""
    model, _ = deep()
    held = []

    class Store(RamStore):
        def __init__(self, pinned: bool) -> None:
            super().__init__(pinned=True)

        def _registered(self, size: int) -> mmap:
            stored = {value.data_ptr() for block in self.blocks.values() for value in block.values()}
            layers = list(model.model.layers.parameters())
            held.append(sum(parameter.data_ptr() not in stored for parameter in layers))
            return mmap(-1, size)

    monkeypatch.setattr(build, "RamStore", Store)
    zo = ZeroOrder(model, lr=1e-3, offload="cpu")
    monkeypatch.undo()
    each = len(list(model.model.layers[0].parameters()))
    assert held == [each * count for count in range(LAYERS, 0, -1)]
    zo.close()


@pytest.mark.parametrize("device", ["mps", "xpu", "hpu"])
def test_devices_whose_copies_are_not_ordered_are_refused(device: str) -> None:
    model, _ = deep()
    before = values(model)
    with pytest.raises(ConfigError, match=f"device='{device}': layers are streamed to CUDA devices"):
        ZeroOrder(model, lr=1e-3, offload="cpu", device=device)
    assert same(model, before)
    zo = ZeroOrder(model, lr=1e-3, offload="cpu")
    assert zo.streaming is not None
    with pytest.raises(ConfigError, match=f"device='{device}'"):
        zo.streaming.compute_on(torch.device(device))
    zo.close()


# "auto"


class Card:
    """A device of 80 GiB, of which something is taken."""

    total = 80 * GIB

    def __init__(self, patch: pytest.MonkeyPatch, taken: int = 0, cached: int = 0):
        self.taken, self.cached = taken, cached
        patch.setattr(torch.cuda, "mem_get_info", lambda _: (self.total - self.taken - self.cached, self.total))
        patch.setattr(torch.cuda, "memory_reserved", lambda _: self.taken + self.cached)
        patch.setattr(torch.cuda, "memory_allocated", lambda _: self.taken)


class Large(nn.Module):
    """A parameter of 40 GiB that takes no memory."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        with torch.device("meta"):
            self.weight = nn.Parameter(torch.empty(40 * GIB, dtype=torch.int8), requires_grad=False)
        self.device = device

    def parameters(self, recurse: bool = True) -> Any:
        class There:
            device, is_meta, numel, element_size = self.device, True, self.weight.numel, self.weight.element_size

        self.there = There()
        yield self.there


def test_what_a_model_takes_on_the_device_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "memory_of", lambda tensor: (id(tensor),))
    card = Card(monkeypatch)
    before = budget.room_for_weights(Large(torch.device("cpu")), CUDA, GIB, 0)
    card.taken = 40 * GIB
    after = budget.room_for_weights(Large(CUDA), CUDA, GIB, 0)
    card.cached = 10 * GIB
    later = budget.room_for_weights(Large(CUDA), CUDA, GIB, 0)
    assert before == after == later == (80 - 8 - 2) * GIB
    assert before > 40 * GIB  # it was streamed, because half of the device was not free after the move


def test_momentum_has_its_part_of_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "memory_of", lambda tensor: (id(tensor),))
    Card(monkeypatch)
    assert budget.room_for_weights(Large(torch.device("cpu")), CUDA, GIB, 3 * 40 * GIB) == (80 - 8 - 2) * GIB // 4


def test_auto_passes_the_state_of_the_rule_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("zo_core.streaming.build.room_for_weights", lambda *given: asked.append(given[2:]))
    for rule in ("sgd", "momentum"):
        model, _ = deep()
        ZeroOrder(model, lr=1e-3, offload="auto", rule=rule)
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    largest = max(layer, model.lm_head.weight.nbytes)
    assert asked == [(largest, 0), (largest, sum(4 * p.numel() for p in model.parameters()))]


def test_a_model_that_fits_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer moves the model, and the engine is made later, when less is free."""
    model, _ = deep()
    room = [1 << 40]
    monkeypatch.setattr("zo_core.streaming.build.room_for_weights", lambda *_: room[0])
    assert offload(model, "auto", device=torch.device("cpu")) is None
    room[0] = 0
    zo = ZeroOrder(model, lr=1e-3, offload="auto")
    assert zo.streaming is None
    other, _ = deep()
    zo = ZeroOrder(other, lr=1e-3, offload="auto")
    assert zo.streaming is not None
    zo.close()


def test_one_device_is_one_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is cached for "cuda" would not be found for the tensors, which are on "cuda:0"."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert with_index(torch.device("cuda")) == torch.device("cuda:1")
    assert with_index(torch.device("cuda:0")) == torch.device("cuda:0")
    assert with_index(torch.device("cpu")) == torch.device("cpu")


def test_every_way_to_name_the_device_of_a_stream_ends_in_that_key(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for module in (build, streaming):
        monkeypatch.setattr(module, "with_index", lambda device: asked.append(str(device)) or torch.device("cpu"))
    model, _ = deep()
    zo = ZeroOrder(model, lr=1e-3, offload="cpu", device="cuda")
    move_streamed(model, torch.device("cuda:1"))
    assert zo.streaming is not None
    zo.streaming.compute_on(torch.device("cuda:2"))
    assert {"cuda", "cuda:1", "cuda:2"} <= set(asked)
    assert zo.streaming.device == torch.device("cpu")
    zo.close()


def test_numbers_are_sent_to_a_gpu_without_waiting_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    tensor = torch.tensor

    def made(values: Any, **settings: Any) -> Tensor:
        asked.append(settings)
        return tensor(values, dtype=settings["dtype"])

    monkeypatch.setattr(torch, "tensor", made)
    monkeypatch.setattr(Tensor, "to", lambda one, *args, **settings: asked.append((args, settings)) or one)
    assert sent([1, 2], CUDA, torch.int32).tolist() == [1, 2]
    assert asked == [{"dtype": torch.int32, "pin_memory": True}, ((CUDA,), {"non_blocking": True})]
