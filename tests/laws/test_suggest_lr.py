"""Law: the range test for the learning rate finds a good one, and leaves no trace."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import arguments, differing, logged, texts, weights, zo_trainer
from lightning_helpers import QUIET, Wrapped, batches, sgd, trainer
from models import closure, tiny
from torch import nn
from transformers import HfArgumentParser

from hf_zo import ZOTrainer, ZOTrainingArguments
from lightning_zo import ZOStrategy
from zo_core import ConfigError, LossError, LrSuggestion, ZeroOrder, ZOConfig, ZOOptimizer, suggest_lr

pytestmark = QUIET


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few forwards, which short runs may spend: the laws hold for any number."""
    monkeypatch.setattr("zo_core.learning_rate.search.FORWARDS", 128)
    monkeypatch.setattr("zo_core.learning_rate.search.SHARE", 100.0)
    monkeypatch.setattr("zo_core.learning_rate.search.LEAST", 16)
    monkeypatch.setattr("zo_core.learning_rate.search.LEAST_STEPS", 4)


METHODS: dict[str, dict[str, Any]] = {
    "spsa": {},
    "fzoo": {"estimator": "fzoo", "num_probes": 2},
    "momentum": {"rule": "momentum"},
    "sign": {"rule": "sign"},
    "several directions": {"num_probes": 2, "weight_decay": 0.1},
    "dropout": {"dropout": True},
}
Closures = list[Callable[[], Any]]


def closures(model: nn.Module, name: str = "mlp", count: int = 2) -> Closures:
    return [closure(name, model, index) for index in range(count)]


def surroundings(model: nn.Module) -> list[Any]:
    """Everything that a step may disturb besides the weights."""
    modes = [module.training for module in model.modules()]
    return [modes, random.getstate(), torch.get_rng_state().tolist(), [p.grad for p in model.parameters()]]


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_the_model_and_its_surroundings_are_as_before(settings: dict[str, Any]) -> None:
    model = tiny("mlp")
    before, around = weights(model), surroundings(model)
    found = suggest_lr(model, closures(model), **settings)
    assert differing(weights(model), before) == []
    assert surroundings(model) == around
    assert found.lr > 0.0


@pytest.mark.parametrize("name", ["convnet", "llama", "recurrent"])
def test_no_trace_in_models_with_statistics_and_tied_weights(name: str) -> None:
    model = tiny(name)
    before, around = weights(model), surroundings(model)
    suggest_lr(model, closures(model, name))
    assert differing(weights(model), before) == []
    assert surroundings(model) == around


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_trace_in_half_precision(dtype: torch.dtype) -> None:
    model = tiny("mlp", dtype=dtype)
    before = weights(model)
    suggest_lr(model, closures(model))
    assert differing(weights(model), before) == []


@pytest.mark.parametrize("calls", [1, 5, 60])
def test_no_trace_after_an_exception(calls: int) -> None:
    model = tiny("mlp")
    before, around = weights(model), surroundings(model)
    run, count = closure("mlp", model), iter(range(1_000))

    def failing() -> Any:
        if next(count) == calls:
            raise KeyboardInterrupt
        return run()

    with pytest.raises(KeyboardInterrupt):
        suggest_lr(model, failing)
    assert differing(weights(model), before) == []
    assert surroundings(model) == around


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "momentum": lambda model: {"rule": "momentum"},
    "AdamW": lambda model: {"optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3)},
    "groups": lambda model: {
        "optimizer": ZOOptimizer(
            [{"params": model.inner.parameters(), "lr": 1e-6}, {"params": model.head.parameters(), "lr": 1e-4}]
        )
    },
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_run_goes_on_as_if_nothing_had_been_tested(make: Callable[[nn.Module], Any]) -> None:
    ends, records = [], []
    for tested in (False, True):
        model = tiny("mlp")
        zo = ZeroOrder(model, **make(model))
        run: list[Any] = []
        zo.listeners.append(run.append)
        for index in range(6):
            if tested and index == 3:
                zo.suggest_lr(closures(model))
            zo.step(closure("mlp", model, index))
        ends.append(weights(model))
        records.append([record.as_dict() for record in run])
    assert differing(*ends) == []
    assert records[0] == records[1]


def test_an_engine_keeps_its_optimizer() -> None:
    model = tiny("mlp")
    zo = ZeroOrder(model, optimizer=ZOOptimizer(model.parameters(), lr=1e-3))
    suggest_lr(model, closures(model), optimizer=zo.optimizer)
    assert zo.optimizer.engine is zo
    assert zo.optimizer.param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize("settings", [{}, {"rule": {"name": "momentum", "beta": 0.9}}], ids=["sgd", "momentum"])
def test_the_rate_on_a_quadratic(settings: dict[str, Any]) -> None:
    """L = |x|²/2 with signs: the best rate is 1 / (d + n - 1), and less by 1 - beta with momentum."""
    d = 300
    model = nn.ParameterList([torch.randn(d, generator=torch.Generator().manual_seed(0))])
    found = suggest_lr(model, lambda: model[0].square().sum() / 2.0, **settings)
    best = 1.0 / d * (0.1 if settings else 1.0)
    assert best / 3.0 < found.lr < best * 1.5


def test_the_table() -> None:
    model = tiny("mlp")
    found = suggest_lr(model, closures(model))
    lines = str(found).splitlines()
    assert len(lines) == len(found.curve) + 2
    assert max(map(len, lines)) <= 80
    assert float(found) == found.lr
    assert [trial.lr for trial in found.curve] == sorted(trial.lr for trial in found.curve)
    assert found.lr < found.limit


# Errors


def test_a_loss_that_does_not_depend_on_the_weights() -> None:
    with pytest.raises(ConfigError, match="no learning rate lowers the loss"):
        suggest_lr(tiny("mlp"), lambda: torch.ones(()), steps=1)


def test_a_loss_that_is_not_finite() -> None:
    with pytest.raises(LossError, match="not finite before any step"):
        suggest_lr(tiny("mlp"), lambda: torch.tensor(float("nan")))


@pytest.mark.parametrize("wrong", [[], [1.0], "loss"])
def test_a_closure_that_is_none(wrong: Any) -> None:
    with pytest.raises(LossError, match="must be a function that returns the loss"):
        suggest_lr(tiny("mlp"), wrong)


@pytest.mark.parametrize("name", ["steps", "forwards"])
def test_a_length_that_is_no_number(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=0 must be a whole number"):
        suggest_lr(tiny("mlp"), lambda: torch.ones(()), **{name: 0})


# lr="auto"


def written(zo: Any) -> str | bool:
    """The setting ``normalise`` of an engine, which is open without a learning rate."""
    return False if zo.normaliser is None else zo.normaliser.name


def test_auto_in_a_bare_loop_is_the_suggested_rate() -> None:
    models = [tiny("mlp"), tiny("mlp")]
    auto = ZeroOrder(models[1], lr="auto")
    how = written(auto)
    found = suggest_lr(models[0], closure("mlp", models[0]), normalise=how)
    engines = [ZeroOrder(models[0], lr=found.lr, normalise=how), auto]
    for model, zo in zip(models, engines, strict=True):
        for index in range(3):
            zo.step(closure("mlp", model, index))
    assert differing(*map(weights, models)) == []
    assert engines[1].suggestion == found


def test_auto_is_found_once_and_not_after_loading() -> None:
    model = tiny("mlp")
    zo = ZeroOrder(model, lr="auto")
    zo.step(closure("mlp", model))
    onward = ZeroOrder(model, lr="auto")
    onward.load_state_dict(zo.state_dict())
    onward.step(closure("mlp", model, 1))
    assert onward.suggestion is None
    assert onward.optimizer.param_groups[0]["lr"] == zo.suggestion.lr  # type: ignore[union-attr]


def test_auto_with_a_schedule_that_it_cannot_reach() -> None:
    model = tiny("mlp")
    zo = ZeroOrder(model, lr="auto")
    torch.optim.lr_scheduler.LinearLR(zo.optimizer, 0.1)
    with pytest.raises(ConfigError, match=r"call zo_core\.suggest_lr first"):
        zo.step(closure("mlp", model))


def test_auto_survives_the_dictionary() -> None:
    assert ZOConfig.from_dict(ZOConfig(lr="auto").to_dict()).lr == "auto"
    with pytest.raises(ConfigError, match="or 'auto'"):
        ZOConfig(lr="fast")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lr_scheduler_type": "linear", "warmup_steps": 2},
        {"gradient_accumulation_steps": 2, "weight_decay": 0.1},
    ],
    ids=["constant", "warmup", "accumulation"],
)
def test_auto_under_hugging_face(tmp_path: Path, settings: dict[str, Any]) -> None:
    auto = zo_trainer(tmp_path, zo_config=ZOConfig(lr="auto"), **settings)
    auto.train()
    found: LrSuggestion = auto.zo.suggestion
    plain = zo_trainer(
        tmp_path, zo_config=ZOConfig(normalise=written(auto.zo)), **{**settings, "learning_rate": found.lr}
    )
    plain.train()
    assert differing(weights(auto.model), weights(plain.model)) == []
    assert logged(auto, "learning_rate") == pytest.approx(logged(plain, "learning_rate"), rel=1e-12)
    assert logged(auto, "loss") == logged(plain, "loss")
    assert found.curve


def test_auto_as_an_argument(tmp_path: Path) -> None:
    (args,) = HfArgumentParser(ZOTrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--zo_learning_rate", "auto"]
    )
    assert args.to_zo_config().lr == "auto"
    args = arguments(tmp_path, ZOTrainingArguments, zo_learning_rate="auto", max_steps=1)
    run = ZOTrainer(model=tiny("llama"), args=args, train_dataset=texts())
    run.train()
    assert run.zo is not None
    assert run.zo.optimizer.param_groups[0]["lr"] == run.zo.suggestion.lr  # type: ignore[union-attr]


def shuffled() -> Any:
    """Batches in an order that comes from the global generator."""
    torch.manual_seed(3)
    return torch.utils.data.DataLoader(batches(), batch_size=None, shuffle=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("scheduled", [False, True], ids=["constant", "schedule"])
def test_auto_under_lightning(tmp_path: Path, scheduled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def optimizer(lr: float) -> Callable[[nn.Module], Any]:
        def make(module: nn.Module) -> Any:
            inner = sgd(lr, momentum=0.9)(module)
            if not scheduled:
                return inner
            schedule = torch.optim.lr_scheduler.LinearLR(inner, 0.5, total_iters=4)
            return {"optimizer": inner, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

        return make

    monkeypatch.setattr("zo_core.learning_rate.search.FORWARDS", 512)  # there is little to learn from random tokens
    module, strategy = Wrapped(optimizer=optimizer(1e-3)), ZOStrategy(ZOConfig(lr="auto"))
    trainer(tmp_path, strategy).fit(module, shuffled())
    found = strategy.zo.suggestion  # type: ignore[union-attr]
    assert found is not None
    plain = Wrapped(optimizer=optimizer(found.lr))
    trainer(tmp_path, ZOStrategy(ZOConfig(normalise=written(strategy.zo)))).fit(plain, shuffled())
    assert differing(weights(module), weights(plain)) == []


def test_lightning_says_that_a_rate_is_too_large(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = Wrapped(optimizer=sgd(10.0))
    trainer(tmp_path, "zo", max_steps=2).fit(module, shuffled())
    (message,) = [m for m in caplog.messages if m.startswith("lr=10 is far above the rates that work")]
    assert message.endswith("or return zo_core.ZOOptimizer(self.parameters()), which needs none")


# Warnings of a diverged run


def test_skipped_steps_are_said_at_powers_of_two(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("mlp")
    zo = ZeroOrder(model)
    with caplog.at_level(logging.WARNING):
        for _ in range(20):
            zo.step(lambda: torch.tensor(float("inf")))
    steps = [int(m.split()[1]) for m in caplog.messages if "skipped" in m]
    assert steps == [0, 1, 3, 7, 15]
    assert "16 steps skipped so far" in caplog.messages[-1]
