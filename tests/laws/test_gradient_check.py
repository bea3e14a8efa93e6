"""Law: `ZeroOrder.check` tells losses whose values have their gradient from those that define another one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import batch, closure, tiny
from torch import Tensor, nn
from traces import generators, left_as_found

from zo_core import ConfigError, LossError, ZeroOrder


@pytest.mark.parametrize("noise", ["rademacher", "gaussian", "low_rank", "sparse", "sampled"])
@pytest.mark.parametrize("name", ["llama", "mlp", "convnet"])
def test_an_ordinary_loss_agrees(name: str, noise: str) -> None:
    model = tiny(name)
    zo = ZeroOrder(model, noise=noise, eps=1e-3, lr=1e-3)
    before = generators()
    with left_as_found(model):
        found = zo.check(closure(name, model))
    assert generators() == before
    assert found.agrees, str(found)
    assert zo.step_count == 0
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("rule", ["sgd", "momentum"])
def test_it_agrees_inside_of_a_window_and_leaves_it_as_it_was(rule: str) -> None:
    ends = []
    for checked in (True, False):
        model = tiny("llama")
        zo = ZeroOrder(model, noise="low_rank", eps=1e-3, lr=1e-3, rule=rule)
        for step in range(4):
            zo.step(closure("llama", model, step))
            if checked:
                assert zo.check(closure("llama", model, step)).agrees
        zo.close()
        ends.append(model.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def policy_gradient(model: nn.Module) -> Tensor:
    """As in GRPO with one iteration: the ratio is exactly 1, and advantages are centred."""
    inputs = batch("llama")
    logits = model(input_ids=inputs["input_ids"]).logits
    logp = logits.log_softmax(-1).gather(-1, inputs["input_ids"].unsqueeze(-1)).sum((1, 2))
    return -(torch.exp(logp - logp.detach()) * (torch.arange(len(logp)) - (len(logp) - 1) / 2)).mean()


def dynamic_weights(model: nn.Module) -> Tensor:
    """As in DFT: each token's negative log-likelihood is weighted with its own probability, which is detached."""
    inputs = batch("llama")
    logits = model(input_ids=inputs["input_ids"]).logits
    nll = F.cross_entropy(logits.flatten(0, 1), inputs["input_ids"].flatten(), reduction="none")
    return (nll * torch.exp(-nll).detach()).mean()


@pytest.mark.parametrize("loss", [policy_gradient, dynamic_weights])
def test_a_loss_that_defines_a_gradient_by_detach_does_not(loss: object) -> None:
    model = tiny("llama")
    found = ZeroOrder(model).check(lambda: loss(model))  # type: ignore[operator]
    assert not found.agrees
    assert "detach()" in str(found)


def test_groups_with_an_eps_of_their_own_are_in_the_units_of_the_step() -> None:
    from zo_core import ZOOptimizer

    model = tiny("mlp")
    groups = [{"params": model.head.parameters(), "eps": 1e-3}, {"params": model.inner.parameters(), "eps": 4e-3}]
    assert ZeroOrder(model, optimizer=ZOOptimizer(groups)).check(closure("mlp", model)).agrees


def test_what_cannot_be_checked_says_why() -> None:
    model = tiny("llama")
    with pytest.raises(LossError, match="autograd knows nothing of"):
        ZeroOrder(model).check(lambda: closure("llama", model)().item())
    with pytest.raises(ConfigError, match="directions=0"):
        ZeroOrder(model).check(closure("llama", model), 0)
    with pytest.raises(ConfigError, match="without offload"):
        ZeroOrder(model, offload="cpu").check(closure("llama", model))
