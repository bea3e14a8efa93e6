"""Law: what cannot work is refused before anything changes, with what came and what to write instead."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import closure, tiny
from torch import nn
from traces import generators, left_as_found

from zo_core import (
    ESTIMATORS,
    NOISES,
    RULES,
    TARGETS,
    ConfigError,
    LossError,
    ModelError,
    StateError,
    ZeroOrder,
    ZOConfig,
    ZOError,
    ZOOptimizer,
)
from zo_core.registry import Registry

REGISTRIES: dict[str, Registry[Any]] = {"estimator": ESTIMATORS, "noise": NOISES, "rule": RULES, "target": TARGETS}


def says(error: BaseException, *words: str) -> None:
    message = str(error)
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"


# The model


def test_a_model_with_nothing_to_train() -> None:
    model = tiny("mlp").requires_grad_(False)
    with left_as_found(model), pytest.raises(ModelError) as caught:
        ZeroOrder(model)
    says(caught.value, "no trainable parameter", "requires_grad_(True)", "PEFT")
    with pytest.raises(ModelError, match="no trainable parameter"):
        ZeroOrder(nn.ReLU())


def test_a_model_without_values() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(ModelError) as caught:
        ZeroOrder(model)
    says(caught.value, "'weight'", "meta device", "load the weights", "from_pretrained")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn], ids=str)
def test_a_dtype_that_cannot_be_moved(dtype: torch.dtype) -> None:
    model = tiny("mlp")
    model.head.extra = nn.Parameter(torch.zeros(3).to(dtype))
    with pytest.raises(ModelError) as caught:
        ZeroOrder(model)
    says(caught.value, "'head.extra'", str(dtype), "float32", "bfloat16", "requires_grad_(False)")
    model.head.extra.requires_grad_(False)
    ZeroOrder(model, lr=1e-3).step(closure("mlp", model))


def test_weights_that_are_not_one_plain_tensor() -> None:
    class Odd(torch.Tensor):
        pass

    model = tiny("mlp")
    model.extra = nn.Parameter(torch.zeros(3).as_subclass(Odd))
    with pytest.raises(ModelError) as caught:
        ZeroOrder(model)
    says(caught.value, "'extra'", "Odd", "requires_grad_(False)")


def test_something_that_is_not_a_module() -> None:
    with pytest.raises(ModelError) as caught:
        ZeroOrder(lambda x: x)  # type: ignore[arg-type]
    says(caught.value, "function", "torch.nn.Module")
    with pytest.raises(ModelError, match="generator"):
        ZeroOrder(tiny("mlp").parameters())  # type: ignore[arg-type]


# Settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": -1e-6}, ["lr=-1e-06", "at least 0", "1e-6"]),
        ({"lr": "1e-6"}, ["lr='1e-6'", "number"]),
        ({"lr": math.nan}, ["lr=nan"]),
        ({"lr": math.inf}, ["lr=inf"]),
        ({"eps": 0}, ["eps=0", "above 0", "1e-3"]),
        ({"eps": -1e-3}, ["eps=-0.001", "above 0"]),
        ({"eps": True}, ["eps=True", "number"]),
        ({"eps": 1e39}, ["eps=1e+39", "above 0 that float32 can hold"]),
        ({"backprop": 2}, ["backprop=2", "several names", "['lm_head']"]),
        ({"backprop": ["head", 2]}, ["backprop=['head', 2]", "several names"]),
        ({"weight_decay": None}, ["weight_decay=None", "at least 0"]),
        ({"weight_decay": -0.1}, ["weight_decay=-0.1", "at least 0"]),
        ({"clip": 0.0}, ["clip=0.0", "above 0", "None"]),
        ({"num_probes": 0}, ["num_probes=0", "at least 1", "'spsa'"]),
        (
            {"num_probes": "3", "estimator": "conservative", "stack_probes": True, "noise": "low_rank"},
            ["num_probes='3'", "whole number"],
        ),
        ({"num_probes": 1.0}, ["num_probes=1.0", "whole number"]),
        ({"num_probes": 1, "estimator": "fzoo"}, ["num_probes=1", "at least 2", "'fzoo'"]),
        ({"seed": 1.5}, ["seed=1.5", "whole number"]),
        ({"dropout": 0.1}, ["dropout=0.1", "True or False"]),
        ({"stochastic_rounding": None}, ["stochastic_rounding=None", "True or False"]),
        ({"backend": "cuda"}, ["backend='cuda'", "'auto'", "'eager'", "'compile'", "'triton'"]),
        ({"rule": {"name": "momentum", "beta": 1.0}}, ["beta=1.0", "below 1"]),
        ({"rule": {"name": "momentum", "gamma": 0.5}}, ["'momentum'", "gamma", "beta"]),
        ({"noise": {"scale": 2}}, ["noise=None", "'rademacher'"]),
        ({"learning_rate": 1e-6}, ["'learning_rate'", "lr", "eps", "num_probes"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_setting_that_cannot_work(settings: dict[str, Any], words: list[str]) -> None:
    model = tiny("mlp")
    before = generators()
    with left_as_found(model), pytest.raises(ConfigError) as caught:
        ZeroOrder(model, **settings)
    says(caught.value, *words)
    assert generators() == before
    with pytest.raises(ConfigError):
        ZOConfig.from_dict(settings)


@pytest.mark.parametrize("kind", list(REGISTRIES))
@pytest.mark.parametrize("value", ["nothing", 3, None, ["spsa"], {"name": "nothing"}], ids=str)
def test_an_unknown_component_lists_the_known_ones(kind: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        ZOConfig(**{kind: value})
    named = value["name"] if isinstance(value, dict) else value
    says(caught.value, f"{kind}={named!r}", *(repr(name) for name in REGISTRIES[kind]))


def test_what_is_meant_is_suggested() -> None:
    for settings, words in (
        ({"estimator": "mezo"}, "MeZO is estimator='spsa'"),
        ({"noise": "normal"}, "noise='gaussian'"),
        ({"noise": "gausian"}, "did you mean 'gaussian'"),
        ({"num_probe": 2}, "did you mean 'num_probes'"),
    ):
        with pytest.raises(ConfigError, match=words):
            ZeroOrder(tiny("mlp"), **settings)


def test_an_engine_and_its_slots_say_what_they_are() -> None:
    zo = ZeroOrder(tiny("mlp"), lr=1e-3)
    assert repr(zo).startswith("ZeroOrder(")
    assert "estimator spsa, 1 direction, noise rademacher, rule sgd, eps 0.001" in repr(zo)
    assert repr(zo.slots[0]) == "Slot('inner.0.weight', float32 [16, 8])"


def test_all_problems_come_in_one_error() -> None:
    with pytest.raises(ConfigError) as caught:
        ZOConfig(lr=-1, eps=0, noise="normal", rule="adam", num_probes=0, backend="gpu", seed="x")  # type: ignore[arg-type]
    problems = caught.value.problems
    assert len(problems) == 7
    says(caught.value, "7 problems", *problems)
    for word in ("lr=-1", "eps=0", "noise='normal'", "rule='adam'", "num_probes=0", "backend='gpu'", "seed='x'"):
        assert sum(word in problem for problem in problems) == 1


def test_triton_where_there_is_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError) as caught:
        ZOConfig(backend="triton")
    says(caught.value, "backend='triton'", "CUDA", "backend='auto'")


def test_errors_are_also_the_errors_python_has_for_them() -> None:
    for ours, theirs in ((ConfigError, ValueError), (ModelError, ValueError), (LossError, TypeError)):
        assert issubclass(ours, ZOError)
        assert issubclass(ours, theirs)
    assert issubclass(StateError, RuntimeError)


# Optimizers


def test_a_rule_that_would_ignore_the_optimizer() -> None:
    model = tiny("mlp")
    with pytest.raises(ConfigError) as caught:
        ZeroOrder(model, optimizer=torch.optim.AdamW(model.parameters()), rule="sgd")
    says(caught.value, "an optimizer was passed", "rule='sgd'", "ignore", "rule='torch'")


def test_the_torch_rule_without_an_optimizer() -> None:
    with pytest.raises(ConfigError) as caught:
        ZeroOrder(tiny("mlp"), rule="torch")
    says(caught.value, "rule='torch'", "optimizer=torch.optim.AdamW(model.parameters()")
    model = tiny("mlp")
    with pytest.raises(ConfigError, match="rule='torch'"):
        ZeroOrder(model, rule="torch", optimizer=ZOOptimizer(model.parameters()))


@pytest.mark.parametrize("make", [ZOOptimizer, torch.optim.SGD])
def test_a_learning_rate_next_to_an_optimizer(make: Callable[..., torch.optim.Optimizer]) -> None:
    model = tiny("mlp")
    with pytest.raises(ConfigError) as caught:
        ZeroOrder(model, lr=1e-6, optimizer=make(model.parameters(), lr=1e-3))
    says(caught.value, "lr=1e-06", "together with an optimizer", "groups")


@pytest.mark.parametrize("make", [ZOOptimizer, torch.optim.SGD])
def test_an_optimizer_of_another_model(make: Callable[..., torch.optim.Optimizer]) -> None:
    optimizer = make(tiny("mlp").parameters(), lr=1e-3)
    with pytest.raises(ModelError) as caught:
        ZeroOrder(tiny("mlp"), optimizer=optimizer)
    says(caught.value, "none of the optimizer's tensors", "this model's parameters")
    assert getattr(optimizer, "engine", None) is None


def test_an_optimizer_that_needs_to_run_the_closure_itself() -> None:
    model = tiny("mlp")
    with pytest.raises(ConfigError) as caught:
        ZeroOrder(model, optimizer=torch.optim.LBFGS(model.parameters()))
    says(caught.value, "LBFGS", "closure", "AdamW")


def test_something_that_is_not_an_optimizer() -> None:
    model = tiny("mlp")
    with pytest.raises(ConfigError) as caught:
        ZeroOrder(model, optimizer="adamw")  # type: ignore[arg-type]
    says(caught.value, "optimizer='adamw'", "torch.optim.AdamW(model.parameters()")
    with pytest.raises(ConfigError, match="is not an optimizer; pass an object"):
        ZeroOrder(model, optimizer=torch.optim.AdamW)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ({"lr": -1.0}, ["lr=-1.0", "at least 0"]),
        ({"eps": 0.0}, ["eps=0.0", "above 0"]),
        ({"eps": math.nan}, ["eps=nan"]),
        ({"eps": math.inf}, ["eps=inf"]),
        ({"eps": 1e39}, ["eps=1e+39", "float32 can hold"]),
        ({"weight_decay": "0.1"}, ["weight_decay='0.1'", "number"]),
        ({"lr": None, "eps": -1}, ["2 problems", "lr=None", "eps=-1"]),
    ],
    ids=str,
)
def test_a_group_with_a_bad_value(group: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        ZOOptimizer([{"params": tiny("mlp").parameters(), **group}])
    says(caught.value, *words)
    with pytest.raises(ConfigError):
        ZOOptimizer(tiny("mlp").parameters(), **group)


def test_an_optimizer_without_an_engine() -> None:
    with pytest.raises(StateError) as caught:
        ZOOptimizer(tiny("mlp").parameters()).step()
    says(caught.value, "no engine", "ZeroOrder(model, optimizer=...)")


@pytest.mark.parametrize("foreign", [False, True], ids=["own", "torch"])
def test_a_step_before_anything_was_measured(foreign: bool) -> None:
    model = tiny("mlp")
    zo = ZeroOrder(model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0) if foreign else None)
    with left_as_found(model), pytest.raises(StateError) as caught:
        zo.optimizer.step()
    says(caught.value, "optimizer.step()", "before", "measure(closure)")
    assert zo.step_count == 0
    zo.step(closure("mlp", model))
    with left_as_found(model), pytest.raises(StateError):
        zo.optimizer.step()  # the step before has used up what was measured


# The closure


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, ["returned None", "return loss"]),
        (torch.zeros(2, 3), ["shape [2, 3]", "one real number", "loss.mean()"]),
        (torch.zeros(0), ["shape [0]"]),
        (torch.tensor(1j), ["complex64", "real"]),
        (SimpleNamespace(loss=1.0), ["SimpleNamespace", "`return output.loss`"]),
        ((torch.tensor(1.0), None), ["tuple", "scalar tensor"]),
        ({"loss": torch.tensor(1.0)}, ["dict", "scalar tensor", """output["loss"]"""]),
        ("loss", ["str"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_closure_that_does_not_return_a_loss(value: object, words: list[str]) -> None:
    model = tiny("mlp")
    zo = ZeroOrder(model, lr=1.0, rule="momentum")

    def returns() -> object:
        closure("mlp", model)()
        return value

    before = generators()
    with left_as_found(model), pytest.raises(LossError) as caught:
        zo.step(returns)
    says(caught.value, "the closure returned", *words)
    assert generators() == before
    assert zo.step_count == 0
    assert not zo.optimizer.state
    with pytest.raises(StateError):
        zo.optimizer.step()


def test_the_output_of_a_transformer_instead_of_its_loss() -> None:
    model = tiny("llama")
    with pytest.raises(LossError) as caught:
        ZeroOrder(model).step(lambda: model(input_ids=torch.zeros(1, 4, dtype=torch.long)))
    says(caught.value, "CausalLMOutput", "`return output.loss`")


def test_a_loss_instead_of_a_closure() -> None:
    model = tiny("mlp")
    with left_as_found(model), pytest.raises(LossError) as caught:
        ZeroOrder(model).step(closure("mlp", model)())  # type: ignore[arg-type]
    says(caught.value, "Tensor", "lambda: model(**batch).loss")


def test_a_closure_that_calls_backward() -> None:
    model = tiny("mlp")

    def loss() -> torch.Tensor:
        value = closure("mlp", model)()
        value.backward()
        return value

    with left_as_found(model), pytest.raises(RuntimeError, match="does not require grad"):
        ZeroOrder(model).step(loss)
