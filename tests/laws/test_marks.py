"""Law: a checkpoint says whose it is. One of another optimizer or with other settings is refused in words that help."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from models import closure, tiny
from torch import nn
from traces import same_bits, weights

from zo_core import RULES, SeedLogWriter, StateError, ZeroOrder, ZOOptimizer
from zo_core.writers import written_by

LR = 1e-2
DATA = Path(__file__).parents[1] / "data" / "v0_1"
LOW_RANK = {"name": "low_rank", "refresh": 3}


def run(zo: ZeroOrder, steps: int, start: int = 0) -> list[dict[str, Any]]:
    return [zo.step(closure("mlp", zo.model, index)).as_dict() for index in range(start, start + steps)]


def trained(**settings: Any) -> ZeroOrder:
    zo = ZeroOrder(tiny("mlp"), **{"lr": LR, **settings})
    run(zo, 2)
    return zo


# The mark


@pytest.mark.parametrize("rule", [*RULES])
def test_every_state_has_a_mark_that_loads_safely(rule: str, tmp_path: Path) -> None:
    model = tiny("mlp")
    torch_rule = RULES.resolve(rule).wants_optimizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR) if torch_rule else None
    zo = ZeroOrder(model, optimizer=optimizer, rule=rule, seed=5, eps=1e-2, noise={"name": "sampled", "of": "sparse"})
    run(zo, 2)
    torch.save(zo.state_dict(), tmp_path / "x")
    mark = torch.load(tmp_path / "x", weights_only=True)["optimizer"]["zo"]
    assert mark["version"] == 1
    assert {name: mark["settings"][name] for name in ("rule", "seed", "eps", "estimator")} == {
        "rule": rule, "seed": 5, "eps": [1e-2], "estimator": "spsa",
    }  # fmt: skip
    assert zo.optimizer.state_dict()["zo"] == zo.state_dict()["optimizer"]["zo"] == mark


def test_an_optimizer_without_an_engine_has_one_too() -> None:
    optimizer = ZOOptimizer(tiny("mlp").parameters())
    state = pickle.loads(pickle.dumps(optimizer)).state_dict()
    assert state["zo"] == {"version": 1, "settings": {}}
    trained().optimizer.load_state_dict(state)
    optimizer.load_state_dict(trained(eps=0.5).optimizer.state_dict())
    assert optimizer.param_groups[0]["eps"] == 0.5


# Another optimizer


def adafactor(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return transformers.Adafactor(parameters, lr=lr, relative_step=False, scale_parameter=False)


OTHERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], str]] = {
    "AdamW": (torch.optim.AdamW, "AdamW or Adam"),
    "Adam": (torch.optim.Adam, "AdamW or Adam"),
    "SGD": (torch.optim.SGD, "SGD"),
    "Adagrad": (torch.optim.Adagrad, "Adagrad"),
    "RMSprop": (torch.optim.RMSprop, "RMSprop"),
    "RAdam": (torch.optim.RAdam, "a variant of Adam"),
    "NAdam": (torch.optim.NAdam, "NAdam"),
    "Adamax": (torch.optim.Adamax, "Adamax"),
    "Adadelta": (torch.optim.Adadelta, "Adadelta"),
    "torch's Adafactor": (torch.optim.Adafactor, "Adafactor"),
    "Adafactor": (adafactor, "Adafactor"),
    "bitsandbytes, 32 bits": (bitsandbytes.optim.AdamW32bit, "bitsandbytes"),
    "bitsandbytes, 8 bits": (bitsandbytes.optim.AdamW8bit, "bitsandbytes"),
    "bitsandbytes, Lion": (bitsandbytes.optim.Lion32bit, "bitsandbytes"),
}


def state_of(make: Callable[..., torch.optim.Optimizer]) -> dict[str, Any]:
    model = tiny("mlp")
    optimizer = make(model.parameters(), lr=LR)
    closure("mlp", model)().backward()
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize("name", list(OTHERS))
def test_a_state_of_another_optimizer_is_refused_with_its_name(name: str) -> None:
    make, writer = OTHERS[name]
    state = state_of(make)
    assert written_by(state) == writer
    zo = ZeroOrder(tiny("mlp"), lr=LR)
    for load in (zo.optimizer.load_state_dict, lambda s: zo.load_state_dict({"step": 1, "seed": 0, "optimizer": s})):
        with pytest.raises(StateError, match=f"written by {writer}, and zeroth-order.*pass that optimizer"):
            load(copy.deepcopy(state))
    assert zo.optimizer.param_groups[0]["eps"] == 1e-3
    own = ZOOptimizer(tiny("mlp").parameters())  # without an engine, too
    with pytest.raises(StateError, match=f"written by {writer}"):
        own.load_state_dict(copy.deepcopy(state))


def test_an_unknown_optimizer_is_refused_by_its_keys() -> None:
    state = state_of(torch.optim.SGD)
    state["param_groups"] = [{"params": state["param_groups"][0]["params"], "lr": 1.0, "eps": 1e-8, "q": 3}]
    with pytest.raises(StateError, match="written by an optimizer whose groups have eps, lr, q, and zeroth-order"):
        trained().optimizer.load_state_dict(state)


def test_a_torch_optimizer_goes_on_with_its_own_state_and_no_other() -> None:
    model = tiny("mlp")
    zo = ZeroOrder(model, optimizer=torch.optim.AdamW(model.parameters(), lr=LR))
    state = state_of(torch.optim.AdamW)
    zo.optimizer.load_state_dict(copy.deepcopy(state))
    assert torch.equal(zo.optimizer.state[model.head.bias]["exp_avg"], state["state"][5]["exp_avg"])
    with pytest.raises(StateError, match="written by SGD, and this run has AdamW or Adam"):
        zo.optimizer.load_state_dict(state_of(torch.optim.SGD))
    with pytest.raises(StateError, match=r"of a run with rule='sgd'.*, and this one has rule='torch'"):
        zo.optimizer.load_state_dict(trained().optimizer.state_dict())


def test_keys_of_ones_own_in_the_groups_are_no_other_optimizer() -> None:
    def make() -> ZeroOrder:
        model = tiny("mlp")
        zo = ZeroOrder(model, optimizer=ZOOptimizer([{"params": model.parameters(), "lr": LR, "layer": 3}]))
        torch.optim.lr_scheduler.CosineAnnealingLR(zo.optimizer, 5)
        return zo

    state = make().optimizer.state_dict()
    del state["zo"]  # version 0.1
    make().optimizer.load_state_dict(state)


def test_a_run_of_version_0_1_goes_on_with_plain_steps_at_its_own_rate() -> None:
    """Where no rate is given now, its rate would otherwise be one of normalised steps, and far too small."""
    state = trained(lr=1e-6).state_dict()
    del state["optimizer"]["zo"]
    zo = ZeroOrder(tiny("mlp"))
    assert zo.normaliser is not None
    zo.load_state_dict(state)
    assert (zo.lr, zo.normaliser) == (1e-6, None)


# Other settings


CHANGED: dict[str, tuple[dict[str, Any], str]] = {
    "estimator": (
        {"estimator": "fzoo", "eps": 1e-3},
        "estimator='spsa', num_probes=1, .*estimator='fzoo', num_probes=8",
    ),
    "noise": ({"noise": "gaussian"}, "noise='rademacher', and this one has noise='gaussian'"),
    "rank": ({"noise": LOW_RANK}, "noise={'name': 'low_rank'.* 'refresh': 3"),
    "rule": ({"rule": "sign"}, "rule='sgd', and this one has rule='sign'"),
    "eps": ({"eps": 1e-2}, "eps=0.001, and this one has eps=0.01; continue with the settings of that run"),
    "num_probes": ({"num_probes": 2}, "num_probes=1, and this one has num_probes=2"),
    "seed": ({"seed": 7}, "seed=5, and this one has seed=7"),
    "clip": ({"clip": 3.0}, "clip=None, and this one has clip=3.0"),
    "dropout": ({"dropout": True}, "dropout=False, and this one has dropout=True"),
    "rounding": ({"stochastic_rounding": False}, "rounding=True, and this one has stochastic_rounding=False"),
    "weight_decay": ({"weight_decay": 0.5}, "weight_decay=0.1, and this one has weight_decay=0.5"),
    "two": ({"eps": 1e-2, "seed": 7}, "eps=0.001, seed=5, and this one has eps=0.01, seed=7"),
}


@pytest.mark.parametrize("marked", [True, False], ids=["marked", "version 0.1"])
@pytest.mark.parametrize("name", list(CHANGED))
def test_other_settings_than_those_of_a_checkpoint_name_both_sides(name: str, marked: bool) -> None:
    changes, words = CHANGED[name]
    state = trained(seed=5, weight_decay=0.1).state_dict()
    if not marked:
        del state["optimizer"]["zo"]
        if name not in ("eps", "seed", "weight_decay"):  # it does not say more
            return
    model = tiny("mlp")
    zo = ZeroOrder(model, lr=LR, **changes)
    before = weights(model)
    with pytest.raises(StateError, match=words):
        zo.load_state_dict(state)
    assert zo.step_count == 0
    assert same_bits(weights(model), before)


@pytest.mark.parametrize("name", [name for name in CHANGED if name != "weight_decay"])
def test_other_settings_than_those_of_a_log_name_both_sides(name: str, tmp_path: Path) -> None:
    changes, words = CHANGED[name]
    zo = ZeroOrder(tiny("mlp"), lr=LR, seed=5)
    log = SeedLogWriter.attach(zo, tmp_path / "log")
    run(zo, 2)
    log.close()
    data = (tmp_path / "log").read_bytes()
    if name == "two":
        words = "eps=0.001, and this one has eps=0.01"  # the seed comes after what decides the measurement
    with pytest.raises(StateError, match=words.replace("num_probes=1, .*", ".*").replace(", num_probes=8", "")):
        SeedLogWriter.attach(ZeroOrder(tiny("mlp"), lr=LR, **changes), tmp_path / "log", follow=True)
    assert (tmp_path / "log").read_bytes() == data


def grouped(model: nn.Module, eps: float) -> ZOOptimizer:
    groups = [{"params": model.inner.parameters()}, {"params": model.head.parameters(), "eps": eps}]
    return ZOOptimizer(groups, lr=LR, eps=1e-3)


def test_each_group_has_an_eps_of_its_own() -> None:
    state = trained(lr=None, optimizer=None).state_dict()
    models = [tiny("mlp") for _ in range(3)]
    first, same, other = (ZeroOrder(m, optimizer=grouped(m, e)) for m, e in zip(models, (0.1, 0.1, 0.2), strict=True))
    same.load_state_dict(first.state_dict())
    with pytest.raises(StateError, match=r"eps=\[0.001, 0.1\], and this one has eps=\[0.001, 0.2\]"):
        other.load_state_dict(first.state_dict())
    with pytest.raises(StateError, match=r"does not fit the model: .*parameter groups"):
        same.load_state_dict(state)


def test_what_changed_in_mid_run_is_no_other_setting() -> None:
    """An eps or a weight decay that a callback takes down is the checkpoint's, not the one that the run began with."""
    zo = trained(weight_decay=0.1)
    zo.optimizer.param_groups[0].update(weight_decay=0.05, lr=0.5, eps=5e-4)
    run(zo, 1)
    again = ZeroOrder(tiny("mlp"), lr=LR, weight_decay=0.1)
    again.load_state_dict(zo.state_dict())
    again.model.load_state_dict(zo.model.state_dict())
    assert again.optimizer.param_groups[0]["eps"] == 5e-4
    assert run(again, 2, 3) == run(zo, 2, 3)
    twice = ZeroOrder(tiny("mlp"), lr=LR, weight_decay=0.1)
    twice.load_state_dict(again.state_dict())


def test_what_nobody_has_said_is_taken_over(tmp_path: Path) -> None:
    zo = ZeroOrder(tiny("mlp"), lr=LR, seed=5, weight_decay=0.1)
    log = SeedLogWriter.attach(zo, tmp_path / "log")
    run(zo, 3)
    log.close()
    again = ZeroOrder(tiny("mlp"), lr=1.0)
    again.load_state_dict(zo.state_dict())
    assert (again.seed, again.optimizer.param_groups[0]["weight_decay"]) == (5, 0.1)
    named = ZeroOrder(tiny("mlp"), seed=5, weight_decay=0.1)
    named.load_state_dict(again.state_dict())
    follower = ZeroOrder(tiny("mlp"), lr=LR, weight_decay=0.1)
    SeedLogWriter.attach(follower, tmp_path / "log", follow=True).close()
    assert follower.seed == 5


# Version 0.1


OLD: dict[str, dict[str, Any]] = {
    "momentum": {"rule": "momentum", "num_probes": 2},
    "low_rank": {"rule": "momentum", "noise": LOW_RANK},
    "sparse": {"noise": "sparse"},
    "adamw": {},
}


def old_engine(name: str, **changes: Any) -> ZeroOrder:
    model = tiny("mlp")
    if name == "adamw":
        return ZeroOrder(model, optimizer=torch.optim.AdamW(model.parameters(), lr=1.0), **changes)
    groups = [{"params": model.inner.parameters()}, {"params": model.head.parameters(), "eps": 1e-2}]
    return ZeroOrder(model, optimizer=ZOOptimizer(groups, lr=1.0, eps=1e-3), **{**OLD[name], **changes})


@pytest.mark.parametrize("name", list(OLD))
def test_checkpoints_of_version_0_1_load_and_go_on(name: str) -> None:
    state = torch.load(DATA / f"{name}.pt", weights_only=True)
    assert "zo" not in state["zo"]["optimizer"]
    zo, twin = old_engine(name), old_engine(name, seed=5)
    zo.model.load_state_dict(state["model"])
    zo.load_state_dict(copy.deepcopy(state["zo"]))
    assert (zo.step_count, zo.seed) == (4, 5)
    again = zo.state_dict()
    mark = again["optimizer"].pop("zo")
    assert mark["settings"]["seed"] == 5
    for index, kept in state["zo"]["optimizer"]["state"].items():
        assert same_bits((mark["windows"] if "factor" in kept else again["optimizer"]["state"])[index], kept)
    assert again["optimizer"]["param_groups"] == state["zo"]["optimizer"]["param_groups"]
    assert mark.get("thresholds") == state["zo"]["optimizer"].get("thresholds")
    twin.model.load_state_dict(state["model"])
    twin.load_state_dict(copy.deepcopy(zo.state_dict()))  # what was loaded is saved again, with a mark
    assert run(twin, 3, 4) == run(zo, 3, 4)
    assert same_bits(weights(twin.model), weights(zo.model))


def test_a_log_of_version_0_1_is_gone_on_with(tmp_path: Path) -> None:
    state = torch.load(DATA / "momentum.pt", weights_only=True)
    path = tmp_path / "log"
    path.write_bytes((DATA / "momentum.zo").read_bytes())
    zo = old_engine("momentum", seed=5)
    zo.load_state_dict(state["zo"])
    zo.model.load_state_dict(state["model"])
    log = SeedLogWriter.attach(zo, path, follow=True)
    run(zo, 1, 4)
    assert log.next_step == 5
    log.close()
    other = old_engine("momentum", seed=6)
    other.step_count = 4
    with pytest.raises(StateError, match="with seed=5, and this one has seed=6"):
        SeedLogWriter.attach(other, path, follow=True)
