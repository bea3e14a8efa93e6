"""Law: a run continues from a checkpoint bit for bit, and an optimizer can be copied and pickled."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import closure, tiny
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from traces import same_bits, weights

from zo_core import RULES, Momentum, StateError, StepRecord, ZeroOrder, ZOOptimizer

LR = 1e-2
OWN_RULES = [name for name in RULES if not RULES.resolve(name).wants_optimizer]


def run(zo: ZeroOrder, name: str, steps: int) -> list[StepRecord]:
    return [zo.step(closure(name, zo.model, index)) for index in range(steps)]


@pytest.mark.parametrize("rule", OWN_RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(rule: str, dtype: torch.dtype) -> None:
    def start(model: nn.Module, seed: int | None) -> tuple[ZeroOrder, LambdaLR]:
        zo = ZeroOrder(model, lr=LR, rule=rule, seed=seed, weight_decay=0.1)
        return zo, LambdaLR(zo.optimizer, lambda step: 1 / (1 + step))

    def go(zo: ZeroOrder, schedule: LambdaLR, indices: range) -> list[dict[str, Any]]:
        records = []
        for index in indices:
            records.append(zo.step(closure("mlp", zo.model, index)).as_dict())
            schedule.step()
        return records

    model = tiny("mlp", dtype=dtype)
    zo, schedule = start(model, seed=3)
    go(zo, schedule, range(3))
    checkpoint = copy.deepcopy((model.state_dict(), zo.state_dict(), schedule.state_dict()))
    rest = go(zo, schedule, range(3, 6))

    fresh = tiny("mlp", dtype=dtype)
    again, its_schedule = start(fresh, seed=None)  # that of the checkpoint
    again.measure(closure("mlp", fresh))  # loading forgets what was under way
    fresh.load_state_dict(checkpoint[0])
    again.load_state_dict(pickle.loads(pickle.dumps(checkpoint[1])))
    its_schedule.load_state_dict(checkpoint[2])
    assert go(again, its_schedule, range(3, 6)) == rest
    assert same_bits(weights(fresh), weights(model))


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adagrad])
def test_a_run_with_a_torch_optimizer_resumes_too(optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    model, fresh = tiny("mlp"), tiny("mlp")
    zo = ZeroOrder(model, optimizer=optimizer(model.parameters(), lr=LR))
    run(zo, "mlp", 3)
    state = copy.deepcopy((model.state_dict(), zo.state_dict()))
    rest = run(zo, "mlp", 3)
    again = ZeroOrder(fresh, optimizer=optimizer(fresh.parameters(), lr=1.0))
    fresh.load_state_dict(state[0])
    again.load_state_dict(state[1])
    assert [r.as_dict() for r in run(again, "mlp", 3)] == [r.as_dict() for r in rest]
    assert same_bits(weights(fresh), weights(model))


def test_a_checkpoint_is_plain_enough_for_safe_loading(tmp_path: Path) -> None:
    model = tiny("mlp")
    zo = ZeroOrder(model, lr=LR, rule="momentum")
    run(zo, "mlp", 2)
    torch.save(zo.state_dict(), tmp_path / "zo.pt")
    other = ZeroOrder(tiny("mlp"), rule="momentum")
    other.load_state_dict(torch.load(tmp_path / "zo.pt", weights_only=True))
    assert other.step_count == 2
    assert other.optimizer.param_groups[0]["lr"] == LR


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda zo: pickle.loads(pickle.dumps(zo))])
@pytest.mark.parametrize("foreign", [False, True], ids=["own", "torch"])
def test_an_optimizer_can_be_copied_and_pickled_without_its_engine(
    duplicate: Callable[[ZOOptimizer], ZOOptimizer], foreign: bool
) -> None:
    model = tiny("mlp")
    if foreign:
        zo = ZeroOrder(model, optimizer=torch.optim.AdamW(model.parameters(), lr=LR))
    else:
        zo = ZeroOrder(model, lr=LR, rule="momentum")
    run(zo, "mlp", 2)
    twin = duplicate(zo.optimizer)
    assert type(twin) is type(zo.optimizer)
    assert twin.engine is None
    assert zo.optimizer.engine is zo
    found, expected = twin.state_dict(), zo.optimizer.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    for index, state in expected["state"].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(found["state"][index][key]), torch.as_tensor(value))
    twin.param_groups[0]["lr"] = 0.5
    assert twin.state_dict()["param_groups"][0]["lr"] == 0.5
    assert zo.optimizer.param_groups[0]["lr"] == LR


def test_the_numbers_of_a_rule_that_a_schedule_has_changed_go_on() -> None:
    for settings in ({}, {"noise": "low_rank"}, {"offload": "cpu"}):
        model, fresh = layers(), layers()
        zo, again = (ZeroOrder(each, lr=LR, rule="momentum", **settings) for each in (model, fresh))
        train(zo, 2)
        zo.flush()
        zo.rule = Momentum(0.2)
        train(zo, 1)
        assert goes_on_alike(zo, again)
        assert again.rule == Momentum(0.2)
        zo.rule = Momentum(0.9)
        assert goes_on_alike(zo, again)
        assert again.rule == Momentum(0.9)
        zo.close(), again.close()


# Which parameter a state belongs to


def layers(names: str = "abcd") -> nn.Sequential:
    """Equal layers, whose states could be taken for each other's."""
    torch.manual_seed(0)
    made = nn.Sequential()
    for name in names:
        made.add_module(name, nn.Linear(6, 6, bias=False))
    return made


def train(zo: ZeroOrder, steps: int) -> None:
    inputs = torch.linspace(-1, 1, 24).view(4, 6).sin()
    for _ in range(steps):
        zo.step(lambda: (torch.tanh(zo.model(inputs)) - 0.3).square().mean())


def goes_on_alike(zo: ZeroOrder, again: ZeroOrder) -> bool:
    """Whether a run that continues from a checkpoint has the weights of the one that wrote it, at once and later."""
    again.model.load_state_dict(copy.deepcopy(zo.model.state_dict()))
    again.load_state_dict(copy.deepcopy(zo.state_dict()))
    at_once = same_bits(weights(zo.model), weights(again.model))
    for each in (zo, again):
        train(each, 3)
        each.flush()
    return at_once and same_bits(weights(zo.model), weights(again.model))


@pytest.mark.parametrize(
    "settings",
    [
        {"rule": "momentum"},
        {"rule": {"name": "sgd", "decay_to": "start"}},
        {"noise": "low_rank"},
        {"noise": "low_rank", "rule": "momentum"},
        {"rule": "momentum", "offload": "cpu"},
    ],
    ids=str,
)
def test_a_run_that_unfroze_layers_goes_on_in_an_engine_that_has_all_of_them(settings: dict[str, Any]) -> None:
    settings = {"lr": LR, "weight_decay": 0.1, **settings}
    model, fresh = layers(), layers()
    for name in "ac":
        model.get_submodule(name).requires_grad_(False)
    zo = ZeroOrder(model, **settings)
    train(zo, 2)
    for name in "ca":
        model.get_submodule(name).requires_grad_(True)
        train(zo, 2)
    again = ZeroOrder(fresh, **settings)
    order = [{id(p): name for name, p in m.named_parameters()} for m in (model, fresh)]
    held = [
        [names[id(t)] for t in z.optimizer.param_groups[0]["params"]]
        for z, names in zip((zo, again), order, strict=True)
    ]
    assert held[0] == held[1]
    assert goes_on_alike(zo, again)
    zo.close(), again.close()


MAKE: list[Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = [
    lambda parameters: ZOOptimizer(parameters, lr=LR),
    lambda parameters: torch.optim.AdamW(parameters, lr=LR),
]


@pytest.mark.parametrize("make", MAKE, ids=["own", "torch"])
def test_a_state_finds_its_parameters_by_name(make: Callable[..., torch.optim.Optimizer]) -> None:
    """Also with another order in the groups, with a frozen layer, and where a wrapper adds to the names."""
    for froze in (False, True):
        model, fresh = layers(), nn.ModuleDict({"module": nn.ModuleDict({"inner": layers()})})
        forward = fresh["module"]["inner"].forward  # type: ignore[index, union-attr]
        fresh.forward = forward  # type: ignore[method-assign]
        rule = {"rule": "momentum"} if make is MAKE[0] else {}
        zo = ZeroOrder(model, optimizer=make([*model.parameters()]), **rule)
        again = ZeroOrder(fresh, optimizer=make([*fresh.parameters()][::-1]), **rule)
        train(zo, 2)
        model.a.requires_grad_(not froze)
        next(fresh.parameters()).requires_grad_(not froze)
        train(zo, 1)
        fresh.load_state_dict({f"module.inner.{name}": value for name, value in weights(model).items()})
        again.load_state_dict(copy.deepcopy(zo.state_dict()))
        for each in (zo, again):
            train(each, 3)
        assert all(map(torch.equal, model.parameters(), fresh.parameters()))


def test_a_state_of_other_parameters_is_refused_and_one_without_names_goes_by_the_order() -> None:
    one, other = layers(), layers()
    one.a.requires_grad_(False)
    other.b.requires_grad_(False)
    zo, again = (ZeroOrder(model, lr=LR, rule="momentum") for model in (one, other))
    train(zo, 2)
    state = zo.state_dict()
    assert state["optimizer"]["zo"]["keys"] == dict(enumerate(["b.weight", "c.weight", "d.weight"]))
    with pytest.raises(StateError, match=r"group 0 of this checkpoint's optimizer holds 'b.weight', and .* 'a.weight'"):
        again.load_state_dict(copy.deepcopy(state))
    assert not again.optimizer.state
    del state["optimizer"]["zo"]["keys"]  # as written by earlier versions
    again.load_state_dict(state)
    assert again.step_count == 2
