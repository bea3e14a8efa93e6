"""Law: the scales that training moves are those that the layers compute with, wherever the model was moved since.

A move between devices gives quantised weights other tensors of scales. Here there is one device, so what such a move
does to the objects is done by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import int4_models
import pytest
import torch
import torchao_models
from torch import Tensor, nn

import zo_core.targets.torchao as torchao_target
from zo_core import Int4Scales, SeedLogWriter, ZeroOrder, replay
from zo_core.seedlog import fingerprint
from zo_core.streaming import move_streamed

SETTINGS: dict[str, Any] = {"lr": 1e-2, "eps": 1e-2, "seed": 3}


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Module.to` does to 4-bit layers what a move to another device does."""

    def to(state: Any, device: Any) -> None:
        state.absmax = state.absmax.clone()

    monkeypatch.setattr(bnb.functional.QuantState, "to", to)


def train(model: nn.Module, zo: ZeroOrder, move_before: tuple[int, ...] = ()) -> list[float]:
    numbers = []
    for index in range(4):
        if index in move_before:
            model.to("cpu")
        record = zo.step(int4_models.closure(model, index))
        numbers += [record.loss, record.projected_grad]
    return numbers


@pytest.mark.usefixtures("moves")
@pytest.mark.parametrize("rule", ["sgd", "momentum"])
@pytest.mark.parametrize("offload", [None, "cpu"])
def test_a_model_that_is_moved_in_mid_run_trains_on(offload: str | None, rule: str) -> None:
    ends = []
    for when in ((), (0, 2)):
        model = int4_models.Quantised()
        zo = ZeroOrder(model, offload=offload, rule=rule, **SETTINGS)
        numbers = train(model, zo, when)
        held = [layer.weight.quant_state.absmax for layer in int4_models.layers(model)]
        assert all(slot.tensor is tensor for slot, tensor in zip(zo.slots, held, strict=True))
        zo.close()
        ends.append((numbers, int4_models.scales(model)))
    assert ends[0][0] == ends[1][0]
    assert int4_models.equal(ends[0][1], ends[1][1])


@pytest.mark.usefixtures("moves")
def test_the_device_of_a_streamed_model_leaves_scales_where_they_are_used() -> None:
    """`offload` moves what is resident after the slots were chosen."""
    model = int4_models.Quantised()
    zo = ZeroOrder(model, offload="cpu", device="cpu", **SETTINGS)
    held = [layer.weight.quant_state.absmax for layer in int4_models.layers(model)]
    assert all(slot.tensor is tensor for slot, tensor in zip(zo.slots, held, strict=True))


@pytest.mark.usefixtures("moves")
def test_a_streamed_model_that_is_moved_takes_its_scales_along() -> None:
    """Its codes stay where they are, so the layers themselves are not moved."""
    model, other = int4_models.Quantised(), int4_models.Quantised()
    zo, twin = ZeroOrder(model, offload="cpu", **SETTINGS), ZeroOrder(other, offload="cpu", **SETTINGS)
    layers = int4_models.layers(model)
    before = [layer.weight.quant_state.absmax.data for layer in layers]  # held, so that nothing else gets their memory
    move_streamed(model, torch.device("cpu"))
    now = {layer.weight.quant_state.absmax.data_ptr() for layer in layers}
    assert not now & {scales.data_ptr() for scales in before}
    assert train(model, zo) == train(other, twin)
    zo.close()
    twin.close()


@pytest.mark.usefixtures("moves")
def test_slots_that_are_chosen_again_are_the_same_tensors() -> None:
    """A trainer takes them in its constructor, and an engine after the move."""
    model = int4_models.Quantised()
    before = [slot.tensor for slot in Int4Scales().slots(model)]
    model.to("cpu")
    after = [slot.tensor for slot in Int4Scales().slots(model)]
    assert all(a is b for a, b in zip(before, after, strict=True))


@pytest.mark.usefixtures("moves")
def test_a_log_replays_into_a_model_that_was_moved(tmp_path: Path) -> None:
    model, other = int4_models.Quantised(), int4_models.Quantised()
    zo = ZeroOrder(model, **SETTINGS)
    log = SeedLogWriter.attach(zo, tmp_path / "log")
    train(model, zo)
    log.close()
    twin = ZeroOrder(other, **SETTINGS)
    other.to("cpu")
    replay(twin, tmp_path / "log")
    assert int4_models.equal(int4_models.scales(other), int4_models.scales(model))


@pytest.mark.usefixtures("moves")
def test_a_fingerprint_is_of_the_scales_in_the_layers() -> None:
    model, other = int4_models.Quantised(), int4_models.Quantised()
    zo, twin = ZeroOrder(model, **SETTINGS), ZeroOrder(other, **SETTINGS)
    train(model, zo)
    other.to("cpu")
    other.load_state_dict(model.state_dict())
    assert fingerprint(twin) == fingerprint(zo)


@pytest.mark.usefixtures("moves")
def test_scales_that_nothing_computes_with_are_noticed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A target of one's own may know nothing of moves."""
    monkeypatch.setattr(Int4Scales, "relink", lambda *_: None)
    model = int4_models.Quantised()
    zo = ZeroOrder(model, **SETTINGS)
    train(model, zo, (0,))
    assert "all losses of the first two steps agree exactly" in caplog.text


def test_other_codes_in_a_layer_keep_their_own_scales() -> None:
    model, other = int4_models.Quantised(), int4_models.Quantised()
    zo = ZeroOrder(model, **SETTINGS)
    layer, fresh = int4_models.layers(model)[0], int4_models.layers(other)[0].weight
    expected = fresh.quant_state.absmax
    layer.weight = fresh
    zo.step(int4_models.closure(model))
    assert layer.weight.quant_state.absmax is expected


def test_torchao_scales_go_where_their_weight_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are put back before every forward, and were on the device that they came from."""

    class Elsewhere:
        """The scales after a move, as far as their attributes tell."""

        device = torch.device("cuda:0")

    class Weight:
        scale: Any = Elsewhere()

    asked: list[torch.device] = []

    def to(tensor: Tensor, device: torch.device) -> Tensor:
        asked.append(device)
        return tensor.clone()

    scale = ZeroOrder(torchao_models.Quantised(), **SETTINGS).slots[0].tensor
    memory, values = scale.data_ptr(), scale.clone()
    module, weight = nn.Module(), Weight()
    module.weight = weight
    torchao_target._known[module] = {"weight": (weight, scale)}
    monkeypatch.setattr(Tensor, "to", to)
    torchao_target.relink(module)
    monkeypatch.undo()
    assert asked == [torch.device("cuda:0")]
    assert weight.scale is scale
    assert scale.data_ptr() != memory
    assert torch.equal(scale, values)
