"""Laws: streamed layers learn beside those under backprop as resident ones do, and no graph runs through them."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from models import closure, tiny
from offload_helpers import TIERS, assert_equal, make, train

from zo_core import ConfigError, ZeroOrder
from zo_core.streaming import Streaming

NAMES = ("lm_head", "model.norm", "model.layers.3")
SETTINGS: list[tuple[dict[str, Any], bool]] = [
    ({}, False),
    ({"dropout": True}, True),
    ({"noise": "low_rank", "rule": "momentum"}, False),
    ({"estimator": "fzoo", "lr": 1e-4, "num_probes": 2, "weight_decay": 0.1}, False),
]


@pytest.mark.parametrize(("settings", "autocast"), SETTINGS, ids=str)
def test_streamed_is_resident(settings: dict[str, Any], autocast: bool, tmp_path: Path) -> None:
    def run(tier: str | None) -> Any:
        model, inputs = make("llama", tied=False, layers=4)
        model.train()
        wrap = (lambda: torch.autocast("cpu", torch.bfloat16)) if autocast else nullcontext
        how = {**settings, "backprop": NAMES, "backprop_lr": 1e-2}
        found = train(model, inputs, tier, tmp_path, steps=5, wrap=wrap, **how)
        streaming = Streaming.of(model)
        names = [] if streaming is None else [block.name for block in streaming.blocks]
        assert names == ([] if tier is None else [f"model.layers.{index}" for index in range(3)])
        return found

    resident = run(None)
    before = make("llama", tied=False, layers=4)[0].state_dict()
    assert not any(torch.equal(before[name], value) for name, value in resident[1].items())
    for tier in TIERS:
        assert_equal(run(tier), resident)


def engine(names: tuple[str, ...] = NAMES, *, tied: bool = False, **settings: Any) -> ZeroOrder:
    model = tiny("llama", tied=tied, layers=4)
    return ZeroOrder(model, **{"lr": 1e-3, "backprop": names, "backprop_lr": 1e-2, "offload": "cpu", **settings})


def test_micro_batches_have_one_sweep_of_probes_and_a_gradient_each() -> None:
    def run(offload: str | None) -> dict[str, torch.Tensor]:
        zo = engine(offload=offload)
        for step in range(3):
            zo.measure_all([closure("llama", zo.model, 2 * step), closure("llama", zo.model, 2 * step + 1)])
            zo.optimizer.step()
        zo.close()
        return zo.model.state_dict()

    streamed, resident = run("cpu"), run(None)
    assert all(torch.equal(streamed[name], value) for name, value in resident.items())


def test_a_checkpoint_continues_bit_for_bit() -> None:
    whole, half = engine(), engine()
    for step in range(4):
        whole.step(closure("llama", whole.model, step))
    for step in range(2):
        half.step(closure("llama", half.model, step))
    again = engine()
    kept = copy.deepcopy(half.state_dict())
    again.model.load_state_dict(half.model.state_dict())
    again.load_state_dict(kept)
    for step in range(2, 4):
        again.step(closure("llama", again.model, step))
    theirs = whole.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in again.model.state_dict().items())


def test_a_part_of_a_layer_keeps_the_whole_layer() -> None:
    zo = engine(("lm_head", "model.layers.3.mlp.down_proj"))
    zo.step(closure("llama", zo.model))
    assert zo.streaming is not None
    assert [block.name for block in zo.streaming.blocks] == [f"model.layers.{index}" for index in range(3)]


@pytest.mark.parametrize("hooks", [nullcontext, torch.autograd.graph.save_on_cpu], ids=["plain", "hooks"])
@pytest.mark.parametrize(
    ("names", "tied"), [(("model.layers.1",), False), (("model.embed_tokens", "lm_head"), False), (("lm_head",), True)]
)
def test_a_graph_through_a_streamed_layer_is_an_error(names: tuple[str, ...], tied: bool, hooks: Any) -> None:
    """Also where a closure does something of its own with what autograd saves, as checkpointing does."""
    zo = engine(names, tied=tied)
    before = copy.deepcopy(zo.model.state_dict())
    loss = closure("llama", zo.model)

    def within() -> torch.Tensor:
        with hooks():
            return loss()

    with pytest.raises(ConfigError, match="without a gap"):
        zo.step(within)
    assert all(torch.equal(value, before[name]) for name, value in zo.model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in zo.model.parameters())


def test_layers_that_cannot_stay_or_all_stay_are_an_error() -> None:
    with pytest.raises(ConfigError, match="none is left to stream"):
        engine(("*.mlp",))
    model = tiny("llama", tied=False, layers=4)
    before = ZeroOrder(model, lr=1e-3, offload="cpu")
    with pytest.raises(ConfigError, match=r"'model.layers.3' is streamed already.*blocks="):
        ZeroOrder(model, lr=1e-3, backprop=NAMES)
    before.close()
    ZeroOrder(model, lr=1e-3, backprop=NAMES).step(closure("llama", model))
