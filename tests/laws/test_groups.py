"""Law: each group of parameters moves by its own learning rate, eps and weight decay; what no group holds stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import closure, tiny
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from traces import weights

from zo_core import NOISES, ConfigError, ZeroOrder, ZOOptimizer

LR, EPS = 1e-2, 1e-2


def grouped(model: nn.Module) -> ZOOptimizer:
    return ZOOptimizer(
        [
            {"params": model.inner.parameters(), "lr": 0.03},
            {"params": model.head.parameters(), "lr": 0.01, "eps": 4 * EPS, "weight_decay": 0.5},
        ],
        eps=EPS,
    )


def test_groups_have_their_own_learning_rate_eps_and_weight_decay() -> None:
    """Powers of two between the eps, so that the scaled coefficients are exact."""
    model = tiny("mlp")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen: list[dict[str, Tensor]] = []
    losses: list[float] = []
    handles = [
        module.register_forward_hook(
            lambda m, args, output, path=path: seen[-1].update(
                {f"{path}.{name}": p.detach().clone() for name, p in m.named_parameters(recurse=False)}
            )
        )
        for path, module in model.named_modules()
    ]

    def loss() -> Tensor:
        seen.append({})
        value = closure("mlp", model)()
        losses.append(value.item())
        return value

    record = ZeroOrder(model, optimizer=grouped(model)).step(loss)
    for handle in handles:
        handle.remove()
    del seen[0], losses[0]  # the first step measures one point twice

    def z(name: str) -> Tensor:
        values = NOISES.resolve("rademacher").z(record.seed, name, 0, start[name].numel())
        return values.view(start[name].shape)

    f32 = lambda value: torch.tensor(value, dtype=torch.float32)  # noqa: E731
    for name, theta in start.items():
        group_eps, lr, decay = (4 * EPS, 0.01, 0.5) if name.startswith("head") else (EPS, 0.03, 0.0)
        for side, perturbed in zip((1, -1), seen, strict=True):
            assert torch.equal(perturbed[name], theta + f32(side * group_eps) * z(name))
        g = (losses[0] - losses[1]) / (2 * group_eps)  # the two-sided difference of this group's own eps
        expected = f32(1 - lr * decay) * theta + f32(-lr * float(f32(g))) * z(name)
        assert torch.equal(model.get_parameter(name).detach(), expected)
    assert record.lr == 0.03


@pytest.mark.parametrize("setting", ["lr", "eps", "weight_decay"])
def test_what_the_groups_hold_cannot_be_given_twice(setting: str) -> None:
    model = tiny("mlp")
    with pytest.raises(ConfigError, match=f"{setting}=0.01 was given together with an optimizer"):
        ZeroOrder(model, optimizer=grouped(model), **{setting: 0.01})


def test_what_the_optimizer_does_not_hold_stays() -> None:
    model = tiny("mlp")
    before = weights(model)
    zo = ZeroOrder(model, optimizer=ZOOptimizer(model.head.parameters(), lr=LR))
    for index in range(3):
        zo.step(closure("mlp", model, index))
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}


def test_schedulers_move_the_groups_of_either_kind_of_optimizer() -> None:
    for make in (grouped, lambda model: torch.optim.SGD(model.parameters(), lr=LR)):
        model = tiny("mlp")
        zo = ZeroOrder(model, optimizer=make(model))
        first = zo.optimizer.param_groups[0]["lr"]
        schedule = LambdaLR(zo.optimizer, lambda step: 0.5**step)
        lrs = []
        for _ in range(3):
            lrs.append(zo.step(closure("mlp", model)).lr)
            schedule.step()
        assert lrs == [first, first / 2, first / 4]


@pytest.mark.parametrize("settings", [{"rule": "sign"}, {"normalise": "gradient"}, {"estimator": "es"}], ids=str)
def test_a_scheduler_from_before_the_engine_must_not_keep_a_rate_that_was_left_open(settings: dict[str, Any]) -> None:
    """It took the placeholder, 0.25, which is the default of steps that are normalised by the curvature alone."""
    alone = ZeroOrder(tiny("mlp"), **settings)
    optimizer = ZOOptimizer((model := tiny("mlp")).parameters())
    LambdaLR(optimizer, lambda step: 1 - step / 100)
    words = rf"which took 0\.25 .* the default here is {alone.lr:.2g}; make the scheduler after .*lr={alone.lr:.2g}"
    with pytest.raises(ConfigError, match=words):
        ZeroOrder(model, optimizer=optimizer, **settings)
    assert ZeroOrder(model, optimizer=optimizer).lr == 0.25
    ZeroOrder(model, optimizer=optimizer, lr="auto", **settings)  # which replaces it
    after = ZOOptimizer(model.parameters())
    assert ZeroOrder(model, optimizer=after, **settings).lr == alone.lr
    LambdaLR(after, lambda step: 1 - step / 100)
    assert ZeroOrder(model, optimizer=after, **settings).lr == alone.lr  # another engine goes on with it
