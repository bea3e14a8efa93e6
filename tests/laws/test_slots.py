"""Law: each tensor is in one slot, whose key is the same however the model is wrapped and belongs to no other slot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import closure, tiny
from torch import Tensor, nn
from traces import same_bits, weights

from zo_core import ZeroOrder, ZOOptimizer
from zo_core.targets import slot_keys

LR = 1e-2


class Holder(nn.Module):
    def __init__(self, attribute: str, model: nn.Module):
        super().__init__()
        setattr(self, attribute, model)

    def forward(self, **inputs: Tensor) -> Tensor:
        return next(self.children())(**inputs)


@pytest.mark.parametrize("path", ["model", "module", "_orig_mod", "model.module", "_orig_mod.module", "module.module"])
@pytest.mark.parametrize("name", ["mlp", "llama", "t5"])
def test_a_wrapped_model_takes_the_same_steps(name: str, path: str) -> None:
    model, inner = tiny(name), tiny(name)
    wrapped = inner
    for attribute in reversed(path.split(".")):
        wrapped = Holder(attribute, wrapped)
    bare, other = ZeroOrder(model, lr=LR), ZeroOrder(wrapped, lr=LR)
    assert [slot.key for slot in other.slots] == [slot.key for slot in bare.slots]
    for _ in range(2):
        assert bare.step(closure(name, model)).as_dict() == other.step(closure(name, wrapped)).as_dict()
    assert same_bits(weights(model), weights(inner))


def test_wrappers_inside_a_model_do_not_show_either() -> None:
    bare = ["encoder.layer.weight", "encoder.layer.bias", "head.weight"]
    for layer in ("module.layer", "layer.module", "_orig_mod.layer._orig_mod.module", "module.module.layer"):
        assert slot_keys([name.replace("layer", layer) for name in bare]) == bare


@pytest.mark.parametrize(
    "names",
    [
        ["weight"],
        ["module"],
        ["a.module", "b.module"],
        ["a.weight", "a.module.weight"],
        ["a.module.weight", "a.weight", "a._orig_mod.weight", "module.a.weight"],
        ["a", "a.b"],
        ["model.a.w", "model.b.w", "w"],
    ],
)
def test_no_two_slots_share_a_key(names: list[str]) -> None:
    """Two tensors with one key would get the same z, and the estimate of both would be wrong."""
    for prefix in ("", "module.", "_orig_mod.module.", "lightning.model."):
        keys = slot_keys([prefix + name for name in names])
        assert len(set(keys)) == len(names)
        assert keys == slot_keys(names)
        assert all(keys)


def test_a_tensor_that_two_modules_hold_is_one_slot() -> None:
    for name in ("llama", "opt", "bert", "t5"):
        tied, untied = (ZeroOrder(tiny(name, tied)).slots for tied in (True, False))
        assert len(tied) < len(untied)
        assert max(len(slot.modules) for slot in tied) >= 2


def test_two_parameters_that_share_memory_are_one_slot() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.data)
    zo = ZeroOrder(model, lr=LR)
    assert [len(slot.tensors) for slot in zo.slots] == [2]
    other = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    other[1].weight = other[0].weight
    other[0].weight.data.copy_(model[0].weight.data)
    x = torch.ones(1, 4)
    twin = ZeroOrder(other, lr=LR)
    for _ in range(2):
        found, expected = zo.step(lambda: model(x).sum()), twin.step(lambda: other(x).sum())
        assert found.projected_grad == expected.projected_grad
        assert torch.equal(model[0].weight, other[0].weight)
        assert model[0].weight.data_ptr() == model[1].weight.data_ptr()


@pytest.mark.parametrize("held", [0, 1])
@pytest.mark.parametrize(("make", "rule"), [(ZOOptimizer, "momentum"), (torch.optim.AdamW, "torch")])
def test_an_optimizer_may_hold_either_of_two_parameters_that_share_memory(
    held: int, make: Callable[..., torch.optim.Optimizer], rule: str
) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.data)
    before = model[0].weight.detach().clone()
    zo = ZeroOrder(model, optimizer=make([model[held].weight], lr=LR), rule=rule)
    zo.step(lambda: model(torch.ones(1, 4)).sum())
    assert not torch.equal(model[0].weight, before)
    assert list(zo.optimizer.state_dict()["state"]) == [0]
