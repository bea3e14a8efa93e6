"""Law: an engine trains what its model has now, by the settings that it shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import closure, tiny
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from traces import same_bits, weights

from zo_core import (
    ConfigError,
    ModelError,
    Momentum,
    SeedLogWriter,
    Sgd,
    Sign,
    StateError,
    UpdateRule,
    ZeroOrder,
    ZOConfig,
    ZOOptimizer,
    replay,
)
from zo_core.rules import Torch

SETTINGS: list[dict[str, Any]] = [
    {},
    {"rule": "momentum"},
    {"noise": "low_rank"},
    {"offload": "cpu", "rule": "momentum"},
    {"offload": "disk"},
    {"noise": "sparse"},
]
EVERYWHERE = pytest.mark.parametrize("settings", SETTINGS, ids=str)


def run(zo: ZeroOrder, start: int, steps: int) -> None:
    for step in range(start, start + steps):
        zo.step(closure("llama", zo.model, step))


def moved(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {name for name, value in weights(model).items() if not torch.equal(before[name], value)}


@EVERYWHERE
def test_frozen_means_frozen_and_unfrozen_means_moving(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny("llama", tied=False)
    zo = ZeroOrder(model, lr=1e-3, **settings)
    run(zo, 0, 2)
    layer = model.model.layers[0]
    layer.requires_grad_(False)
    before = weights(model)
    run(zo, 2, 2)
    frozen = {f"model.layers.0.{name}" for name, _ in layer.named_parameters()}
    assert moved(before, model) == before.keys() - frozen
    assert "no longer trained (9)" in caplog.text
    layer.requires_grad_(True)
    before = weights(model)
    run(zo, 4, 2)
    assert moved(before, model) == before.keys()
    assert "trained from now on (9)" in caplog.text


@pytest.mark.parametrize("settings", [{}, {"rule": "momentum"}, {"offload": "cpu", "rule": "momentum"}], ids=str)
def test_what_goes_on_moving_keeps_its_momentum(settings: dict[str, Any]) -> None:
    """The run is that of an engine that was made with the new set and given the state of the old one."""
    model, other = (tiny("llama", tied=False) for _ in range(2))
    zo, first = ZeroOrder(model, lr=1e-3, **settings), ZeroOrder(other, lr=1e-3, **settings)
    run(zo, 0, 3)
    run(first, 0, 3)
    first.close()
    for net in (model, other):
        net.model.layers[1].requires_grad_(False)
    own = {name: value for name, value in settings.items() if name != "offload"}
    second = ZeroOrder(other, lr=1e-3, **own)
    second.step_count = 3
    for tensor, kept in first.optimizer.state.items():
        if tensor.requires_grad:
            second.optimizer.state[tensor] = kept
    run(zo, 3, 3)
    run(second, 3, 3)
    assert same_bits(weights(model), weights(other))


def test_a_replaced_layer_is_the_one_that_is_trained() -> None:
    model = tiny("mlp")
    zo = ZeroOrder(model, lr=1e-2)
    zo.step(closure("mlp", model))
    old, model.head = model.head, nn.Linear(16, 3)
    before, start = old.weight.detach().clone(), model.head.weight.detach().clone()
    zo.step(closure("mlp", model))
    assert torch.equal(old.weight, before)
    assert not torch.equal(model.head.weight, start)
    model.head.weight = nn.Parameter(torch.zeros(3, 16))
    zo.step(closure("mlp", model))
    assert model.head.weight.any()


@pytest.mark.parametrize("settings", [{}, {"noise": "low_rank"}, {"offload": "cpu"}], ids=str)
def test_adapters_that_come_later_move_and_their_base_stays(settings: dict[str, Any]) -> None:
    model = tiny("llama", tied=False)
    zo = ZeroOrder(model, lr=1e-2, **settings)
    run(zo, 0, 1)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    before = weights(adapted)
    zo.step(closure("llama", adapted, 1))
    changed = moved(before, adapted)
    assert changed
    assert all("lora_" in name for name in changed)


def test_other_adapters_mean_those_adapters() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(tiny("llama", tied=False), config, "one")
    model.add_adapter("two", config)
    model.set_adapter("one")
    zo = ZeroOrder(model, lr=1e-2)
    for active, other in (("one", "two"), ("two", "one"), ("one", "two")):
        model.set_adapter(active)
        before = weights(model)
        zo.step(closure("llama", model))
        changed = moved(before, model)
        assert changed
        assert all(f".{active}." in name and f".{other}." not in name for name in changed)


def test_what_an_optimizer_of_one_s_own_does_not_hold_does_not_move(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("mlp")
    model.head.requires_grad_(False)
    zo = ZeroOrder(model, optimizer=ZOOptimizer(model.inner.parameters(), lr=1e-2))
    zo.step(closure("mlp", model))
    model.head.requires_grad_(True)
    before = weights(model)
    zo.step(closure("mlp", model))
    assert all(name.startswith("inner") for name in moved(before, model))
    assert "trainable, but not in the optimizer (2): head.weight, head.bias" in caplog.text


def test_nothing_left_to_train_is_an_error() -> None:
    model = tiny("mlp")
    zo = ZeroOrder(model)
    model.requires_grad_(False)
    with pytest.raises(ModelError, match="no trainable parameter"):
        zo.step(closure("mlp", model))


def test_the_log_begins_anew_and_replays(tmp_path: Path) -> None:
    model = tiny("llama", tied=False)
    zo = ZeroOrder(model, lr=1e-3)
    log = SeedLogWriter.attach(zo, tmp_path / "seedlog.zo")
    run(zo, 0, 3)
    model.model.layers[0].requires_grad_(False)
    middle = weights(model)
    run(zo, 3, 3)
    log.close()
    first, second = tiny("llama", tied=False), tiny("llama", tied=False)
    assert replay(first, tmp_path / "seedlog-1.zo") == 3
    assert same_bits(weights(first), middle)
    second.load_state_dict(middle)
    second.model.layers[0].requires_grad_(False)
    assert replay(second, tmp_path / "seedlog.zo") == 6
    assert same_bits(weights(second), weights(model))


# Settings


def test_settings_of_a_live_engine_take_effect() -> None:
    model, other = tiny("mlp"), tiny("mlp")
    zo, fresh = ZeroOrder(model, lr=1e-3), ZeroOrder(other, lr=1e-2, eps=1e-2, weight_decay=0.1)
    zo.lr, zo.eps, zo.weight_decay = 1e-2, 1e-2, 0.1
    assert (zo.lr, zo.eps, zo.weight_decay) == (1e-2, 1e-2, 0.1)
    assert zo.step(closure("mlp", model)).as_dict() == fresh.step(closure("mlp", other)).as_dict()
    assert same_bits(weights(model), weights(other))


def test_the_projected_gradient_is_in_the_units_of_the_eps_that_is_set() -> None:
    model = tiny("mlp")
    zo = ZeroOrder(model, lr=0.0, eps=1e-3)
    losses = []
    for eps in (1e-3, 2e-3):
        zo.eps, zo.step_count = eps, 0
        plus, minus = zo.losses([closure("mlp", model)])[0]
        zo.discard()
        losses.append((plus - minus).item() / (2 * eps))
        assert zo.step(closure("mlp", model)).projected_grad == losses[-1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.parametrize("name", ["num_probes", "estimator", "noise", "target", "dropout", "offload", "clip", "seed"])
def test_what_is_fixed_says_so(name: str) -> None:
    zo = ZeroOrder(tiny("mlp"))
    with pytest.raises(AttributeError, match=rf"{name} is fixed once the engine is made; make another one"):
        setattr(zo, name, getattr(ZOConfig(), name))


def test_misspelt_and_impossible_settings_are_errors() -> None:
    zo = ZeroOrder(tiny("mlp"))
    with pytest.raises(AttributeError, match="no attribute 'learning_rate'"):
        zo.learning_rate = 1e-3
    with pytest.raises(ConfigError, match=r"lr=-1\.0 must be a number"):
        zo.lr = -1.0
    with pytest.raises(ConfigError, match="eps=0 must be a number above 0"):
        zo.eps = 0
    with pytest.raises(AttributeError, match="must be a rule itself"):
        zo.rule = "momentum"
    with pytest.raises(ConfigError, match=r"eps=1e\+39 must be a number above 0 that float32 can hold"):
        zo.eps = 1e39
    zo.measure(closure("mlp", zo.model))
    with pytest.raises(StateError, match="between two steps"):
        zo.eps = 1e-2


@pytest.mark.parametrize("rule", [Momentum(0.5), Sign(), Torch()], ids=repr)
def test_the_kind_of_a_rule_is_fixed_since_no_log_could_follow(rule: UpdateRule) -> None:
    zo = ZeroOrder(tiny("mlp"), rule="sgd")
    with pytest.raises(AttributeError, match=rf"rule='sgd' is fixed .*replace\(rule={rule.name.title()}"):
        zo.rule = rule
    assert zo.rule == Sgd()


def test_an_eps_that_changes_in_a_group_during_a_step_is_an_error_and_not_another_estimate() -> None:
    model, other = tiny("mlp"), tiny("mlp")
    zo, fresh = ZeroOrder(model, lr=1e-2), ZeroOrder(other, lr=1e-2, eps=1e-1)
    zo.measure(closure("mlp", model))
    zo.optimizer.param_groups[0]["eps"] = 1e-1
    with pytest.raises(StateError, match="eps cannot change while a step is being measured"):
        zo.optimizer.step()
    assert zo.step(closure("mlp", model)).as_dict() == fresh.step(closure("mlp", other)).as_dict()
    assert same_bits(weights(model), weights(other))


def test_a_run_is_at_a_step_and_has_a_seed_that_its_log_can_hold(tmp_path: Path) -> None:
    zo = ZeroOrder(tiny("mlp"), lr=1e-2)
    for step in (-1, 1.5, 2**32):
        with pytest.raises(StateError, match="must be a whole number from 0 to 4294967295"):
            zo.at(step)  # type: ignore[arg-type]
    for seed in (1.5, True, 2**128, -(2**200)):
        with pytest.raises(StateError, match=r"seed=.* must be a whole number of at most 128 bits"):
            zo.at(0, seed)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"seed=.* must be a whole number of at most 128 bits"):
            ZOConfig(seed=seed)  # type: ignore[arg-type]
    zo.at(2**32 - 2, 1 - 2**128)
    log = SeedLogWriter.attach(zo, tmp_path / "log")
    zo.step(closure("mlp", zo.model))
    with pytest.raises(StateError, match="a run has at most 4294967295 steps"):
        zo.step(closure("mlp", zo.model))
    log.close()
    again = tiny("mlp")
    assert replay(again, tmp_path / "log", progress=False) == 2**32 - 1
    assert same_bits(weights(again), weights(zo.model))
