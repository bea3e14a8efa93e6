"""Law: a measurement leaves weights, modes, hooks and generators as they were, by any way out."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from models import EVERY, closure, tiny
from probing import EPS, POINTS, measure, moved
from torch import Tensor, nn
from traces import generators, left_as_found, same_bits, weights

from zo_core import LossError, ZeroOrder

EVERY_MODEL = pytest.mark.parametrize("name", EVERY)
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@EVERY_DTYPE
@EVERY_MODEL
def test_weights_buffers_objects_modes_and_hooks_are_what_they_were(name: str, dtype: torch.dtype) -> None:
    model = tiny(name, dtype=dtype)
    for index, module in enumerate(model.modules()):
        module.training = index % 3 != 1
    before = generators()
    with left_as_found(model):
        measure(model, closure(name, model))
    assert generators() == before


@pytest.mark.parametrize("name", ["llama", "functional_tied_head", "convnet", "unseen"])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_an_exception_in_the_middle_of_the_forward_restores_everything(name: str, at: int) -> None:
    model = tiny(name)
    inner = [module for module in model.modules() if module._parameters][-2]
    calls: list[int] = []
    forward = inner.forward

    def fails(*args: object, **kwargs: object) -> Tensor:
        calls.append(1)
        if len(calls) == at + 1:
            raise ZeroDivisionError("in the middle")
        return forward(*args, **kwargs)

    zo = ZeroOrder(model, eps=EPS, num_probes=2)
    if name == "unseen":
        inner = model.head  # the one that is called
        forward = inner.forward
    inner.forward = fails
    with left_as_found(model), pytest.raises(ZeroDivisionError, match="in the middle"):
        zo.step(closure(name, model))
    assert zo.step_count == 0
    del inner.forward
    found = zo.step(closure(name, model))
    fresh = tiny(name)
    assert found == ZeroOrder(fresh, eps=EPS, num_probes=2).step(closure(name, fresh))
    assert same_bits(weights(model), weights(fresh))


def test_keyboard_interrupt_restores_everything() -> None:
    model = tiny("mlp")

    def loss() -> Tensor:
        closure("mlp", model)()
        raise KeyboardInterrupt

    with left_as_found(model), pytest.raises(KeyboardInterrupt):
        measure(model, loss)


def test_a_loss_that_is_refused_restores_everything() -> None:
    model = tiny("mlp")
    with left_as_found(model), pytest.raises(LossError):
        measure(model, lambda: closure("mlp", model)().expand(2))


def test_users_hooks_stay_and_see_the_perturbed_weights() -> None:
    model = tiny("mlp")
    seen = []
    model.head.register_forward_pre_hook(lambda module, args: seen.append(module.weight.detach().clone()))
    model.head.register_forward_hook(lambda module, args, output: seen.append(module.weight.detach().clone()))
    with left_as_found(model):
        measure(model, closure("mlp", model), POINTS[:1])
    expected = moved(model, POINTS[0]).head.weight
    assert torch.equal(seen[0], expected)
    assert torch.equal(seen[1], expected)


def test_gradients_that_were_there_stay_and_none_are_made() -> None:
    model = tiny("mlp")
    model.head.bias.grad = torch.ones(3)
    measure(model, closure("mlp", model))
    assert torch.equal(model.head.bias.grad, torch.ones(3))
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["head.bias"]
    assert torch.is_grad_enabled()
    closure("mlp", model)().backward()  # and autograd still works on these parameters
    assert model.head.weight.grad is not None


# Modes and randomness


def test_probes_run_in_eval_mode_unless_dropout_is_asked_for() -> None:
    model = tiny("convnet")
    model.head.eval()
    seen: list[list[bool]] = []
    loss = closure("convnet", model)

    def looks() -> Tensor:
        seen.append([module.training for module in (model, model.norm, model.dropout, model.head)])
        return loss()

    ZeroOrder(model, lr=1e-6).step(looks)
    ZeroOrder(model, lr=1e-6, dropout=True).step(looks)
    assert seen == [[False] * 4] * 3 + [[True, False, True, False]] * 3  # a first step measures one point twice


@pytest.mark.parametrize("dropout", [True, False])
def test_batchnorm_statistics_do_not_move(dropout: bool) -> None:
    model = tiny("convnet")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    zo = ZeroOrder(model, lr=1e-2, dropout=dropout)
    for _ in range(3):
        zo.step(closure("convnet", model))
    assert same_bits(dict(model.named_buffers()), before)
    assert model.norm.training


@pytest.mark.parametrize("name", ["bert", "unseen"])
def test_all_probes_share_their_random_numbers_and_a_step_draws_what_one_forward_draws(name: str) -> None:
    model = tiny(name)
    other = copy.deepcopy(model)
    drawn = []

    def loss() -> Tensor:
        value = closure(name, model)()
        drawn.append((torch.rand(()).item(), np.random.rand(), random.random()))
        return value

    start = torch.get_rng_state(), np.random.get_state(), random.getstate()
    ZeroOrder(model, dropout=True, num_probes=3).step(loss)
    after = generators()
    torch.set_rng_state(start[0])
    np.random.set_state(start[1])
    random.setstate(start[2])
    assert generators() != after
    with torch.no_grad():
        closure(name, other)()
    once = (torch.rand(()).item(), np.random.rand(), random.random())
    assert generators() == after
    assert len(drawn) >= 6
    assert drawn == [once] * len(drawn)


def test_dropout_masks_are_the_same_on_both_sides() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    masks = []

    def loss() -> Tensor:
        output = model(torch.ones(64, 4))
        masks.append(output == 0)
        return output.sum()

    ZeroOrder(model, dropout=True).step(loss)
    assert all(torch.equal(masks[0], mask) for mask in masks)
    assert 0 < masks[0].float().mean() < 1
    ZeroOrder(model, dropout=True).step(loss)
    assert not torch.equal(masks[0], masks[-1])  # another step, another mask
