"""Law: whoever reads parameters between steps sees the weights as they are, and the run does not depend on it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import closure, tiny
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from traces import same_bits

from zo_core import LowRank, ZeroOrder
from zo_core.stand_ins import WITHOUT_VALUES, StandIn, ordinary, stand_in

WINDOW = LowRank(refresh=3)
PLACES: list[dict[str, Any]] = [
    {"noise": WINDOW},
    {"noise": WINDOW, "rule": "momentum", "weight_decay": 0.1},
    {"offload": "cpu"},
    {"offload": "disk", "rule": "momentum"},
    {"offload": "cpu", "noise": WINDOW},
]
EVERYWHERE = pytest.mark.parametrize("settings", PLACES, ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def engine(dtype: torch.dtype = torch.float32, **settings: Any) -> ZeroOrder:
    return ZeroOrder(tiny("llama", dtype=dtype), lr=1e-3, **settings)


def step(zo: ZeroOrder, index: int) -> None:
    zo.step(closure("llama", zo.model, index))


def true_weights(zo: ZeroOrder) -> dict[str, Tensor]:
    """The weights as a checkpoint has them: of a copy of the run, closed."""
    return {name: value.clone() for name, value in zo.model.state_dict().items()}


def plainly(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


#: What callbacks, averages and users do.
READERS: dict[str, Callable[[nn.Module], dict[str, Tensor]]] = {
    "detach": plainly,
    "data": lambda model: {name: p.data.clone() for name, p in model.named_parameters()},
    "copy_": lambda model: {n: torch.empty_like(p).detach().copy_(p) for n, p in model.named_parameters()},
    "numpy": lambda model: {
        name: torch.from_numpy(p.detach().float().numpy().copy()).to(p.dtype) for name, p in model.named_parameters()
    },
    "deep copy": lambda model: plainly(copy.deepcopy(model)),
    "pickle of a parameter": lambda model: {
        name: pickle.loads(pickle.dumps(p)).detach() for name, p in model.named_parameters()
    },
    "foreach": lambda model: dict(
        zip(
            (name for name, _ in model.named_parameters()),
            torch._foreach_mul([p.detach() for p in model.parameters()], 1.0),
            strict=True,
        )
    ),
    "state_dict": lambda model: {name: model.state_dict()[name].clone() for name, _ in model.named_parameters()},
    "arithmetic": lambda model: {name: (p * 1).detach() for name, p in model.named_parameters()},
}


@EVERYWHERE
@pytest.mark.parametrize("reader", READERS)
def test_readers_see_the_weights_and_disturb_nothing(reader: str, settings: dict[str, Any]) -> None:
    zo, alone = engine(**settings), engine(**settings)
    for index in range(7):
        step(zo, index)
        step(alone, index)
        seen = READERS[reader](zo.model)
        expected = {name: true_weights(alone)[name] for name in seen}
        assert same_bits(seen, expected)
    zo.close()
    alone.close()
    assert same_bits(plainly(zo.model), plainly(alone.model))


@DTYPES
@EVERYWHERE
def test_what_is_written_counts_from_the_next_step_on(settings: dict[str, Any], dtype: torch.dtype) -> None:
    zo = engine(dtype, **settings)
    for index in range(4):
        step(zo, index)
    before = plainly(zo.model)
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"]
    named = dict(zo.model.named_parameters())
    with torch.no_grad():
        for name in names:
            named[name].data.mul_(2.0)  # a swap of averaged weights writes like this
    after = plainly(zo.model)
    assert all(torch.equal(after[name], before[name] * (2.0 if name in names else 1.0)) for name in before)
    zo.lr = 0.0
    step(zo, 4)
    assert same_bits(plainly(zo.model), after) or settings.get("rule") == "momentum"
    assert same_bits({name: zo.model.state_dict()[name] for name in after}, plainly(zo.model))
    zo.close()
    if settings.get("rule") != "momentum":
        assert same_bits(plainly(zo.model), after)


@EVERYWHERE
def test_a_deep_copy_computes_what_the_model_computes(settings: dict[str, Any]) -> None:
    zo = engine(**settings)
    for index in range(4):
        step(zo, index)
    copied = copy.deepcopy(zo.model).eval()
    zo.close()
    loss = closure("llama", copied)
    with torch.no_grad():
        assert torch.equal(loss(), closure("llama", zo.model.eval())())
    fresh = ZeroOrder(copied, lr=1e-3)
    fresh.step(loss)
    assert all(parameter.isfinite().all() for parameter in copied.parameters())


@EVERYWHERE
def test_an_average_of_the_weights_is_their_average(settings: dict[str, Any]) -> None:
    zo, alone = engine(**settings), engine(**settings)
    averaged = torch.optim.swa_utils.AveragedModel(tiny("llama"), multi_avg_fn=None)
    expected: dict[str, Tensor] = {}
    for index in range(5):
        step(zo, index)
        step(alone, index)
        averaged.update_parameters(zo.model)
        now = true_weights(alone)
        count = index + 1
        expected = {
            name: value if index == 0 else expected[name] + (value - expected[name]) / count
            for name, value in now.items()
        }
    for name, value in averaged.module.state_dict().items():
        assert torch.allclose(value, expected[name], rtol=0.0, atol=1e-6)  # torch may sum in another order


def test_adapters_are_merged_with_the_last_window() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ends = []
    for close in (True, False):
        torch.manual_seed(1)
        model = get_peft_model(tiny("llama", tied=False), config)
        zo = ZeroOrder(model, lr=1e-2, eps=1e-2, noise="low_rank")
        for index in range(4):
            zo.step(closure("llama", model, index))
        if close:
            zo.close()
        ends.append(plainly(model.merge_and_unload()))
    assert same_bits(*ends)


@pytest.mark.parametrize("settings", [{"noise": WINDOW}, {"offload": "cpu"}], ids=str)
def test_metadata_and_no_ops_bring_nothing(settings: dict[str, Any]) -> None:
    zo = engine(**settings)
    step(zo, 0)
    behind = [p for p in zo.model.parameters() if isinstance(p, StandIn)]
    assert behind
    zo.model.to("cpu").to(torch.float32).requires_grad_(True).train()
    zo.model.zero_grad()
    assert sum(p.numel() * p.element_size() for p in zo.model.parameters())
    assert {(p.device.type, p.dtype, p.ndim > 0, p.is_leaf) for p in zo.model.parameters()}
    assert zo.model.num_parameters() > 0
    assert all(isinstance(p, StandIn) for p in behind)
    assert all(isinstance(p, nn.Parameter) for p in behind)


def test_of_a_model_larger_than_the_memory_one_block_is_there_at_a_time() -> None:
    zo = engine(offload="cpu")
    step(zo, 0)
    for parameter in zo.model.parameters():
        parameter.norm()
    assert {block.name for block, _ in zo.streaming.read} == {"model.layers.1"}
    held = [parameter.data for parameter in zo.model.parameters()]  # who holds on to what was read keeps it
    assert {block.name for block, _ in zo.streaming.read} == {"model.layers.0", "model.layers.1"}
    assert all(value.isfinite().all() for value in held)


def test_after_training_parameters_are_ordinary(tmp_path: Path) -> None:
    for settings in PLACES:
        zo = engine(**settings)
        step(zo, 0)
        zo.close()
        assert all(type(p) is nn.Parameter and not vars(p) for p in zo.model.parameters())


def test_a_stand_in_is_the_same_object_with_another_class() -> None:
    parameter, real = nn.Parameter(torch.zeros(())), torch.arange(6.0).view(2, 3)
    parameter.data = torch.zeros(()).expand(2, 3)

    def bring() -> None:
        ordinary(parameter)
        parameter.data = real

    stand_in(parameter, bring)
    assert isinstance(parameter, nn.Parameter)
    assert parameter.shape == (2, 3)
    assert isinstance(parameter, StandIn)
    assert (parameter + 1).sum().item() == 21
    assert type(parameter) is nn.Parameter


def test_functions_without_values_are_known_by_what_torch_calls_them() -> None:
    assert torch.Tensor.detach not in WITHOUT_VALUES
    assert torch.Tensor.data.__get__ not in WITHOUT_VALUES
    assert torch.Tensor.shape.__get__ in WITHOUT_VALUES
    assert torch.Tensor.is_cuda.__get__ in WITHOUT_VALUES
