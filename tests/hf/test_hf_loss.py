"""Law: only the loss runs once per probe; the rest of a trainer's step runs once, at the weights as they are."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hf_helpers import PLACES, Batch, arguments, batches, differing, logged, run, texts, weights, zo_trainer
from models import tiny
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from hf_zo import ZOTrainer, ZOTrainerMixin
from zo_core import ConfigError, SeedLog, ZeroOrder, ZOConfig


class Noisy(Trainer):
    """Draws random numbers while it prepares a batch, and looks at the model."""

    def _prepare_inputs(self, inputs: Any) -> Any:
        inputs = super()._prepare_inputs(inputs)
        drawn.append((torch.rand(()).item(), float(np.random.rand())))
        with torch.no_grad():
            seen.append(self.model.lm_head(torch.ones(32)).sum().item())
        mask = torch.rand(inputs["labels"].shape) < 0.2
        return {**inputs, "labels": inputs["labels"].masked_fill(mask, -100)}


class ZONoisy(ZOTrainerMixin, Noisy):
    """The mixin in front of it."""


drawn: list[tuple[float, float]] = []
seen: list[float] = []


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("settings", PLACES, ids=str)
def test_random_numbers_of_the_preparation_are_those_of_the_plain_trainer(
    tmp_path: Path, settings: dict[str, Any], accumulated: int
) -> None:
    rows: list[list[tuple[float, float]]] = []
    looks: list[list[float]] = []
    for cls in (Noisy, ZONoisy):
        drawn.clear()
        seen.clear()
        own = {"zo_config": ZOConfig(**settings)} if cls is ZONoisy else {}
        args = arguments(tmp_path, learning_rate=0.0, gradient_accumulation_steps=accumulated, num_train_epochs=2)
        torch.manual_seed(5)
        cls(tiny("llama"), args, train_dataset=texts(), **own).train()
        rows.append(list(drawn))
        looks.append(list(seen))
    assert rows[0] == rows[1]
    assert len({torch_number for torch_number, _ in rows[1]}) == 8
    assert looks[0] == pytest.approx(looks[1], rel=1e-6)  # with an lr of 0: the weights as they are, not a probe's


class Scaled(Trainer):
    """Scales the loss on its way to backward."""

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        loss *= 0.5
        self.accelerator.backward(loss)
        return loss.detach()


class OwnBackward(Scaled):
    """Does not ask accelerate."""

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch) * 0.5
        loss.backward()
        return loss.detach()


class Added(Trainer):
    """Adds a penalty outside of compute_loss."""

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        inputs = self._prepare_inputs(inputs)
        loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        loss = loss + 0.1 * sum(parameter.pow(2).sum() for parameter in model.parameters())
        self.accelerator.backward(loss)
        return loss.detach()


class WithoutComputeLoss(Trainer):
    """Has a loss of its own."""

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        loss = model(**self._prepare_inputs(inputs)).loss
        self.accelerator.backward(loss)
        return loss.detach()


def mixed(cls: type[Trainer]) -> type[Any]:
    return type(f"ZO{cls.__name__}", (ZOTrainerMixin, cls), {})


@pytest.mark.parametrize("cls", [Scaled, OwnBackward])
def test_a_factor_of_the_loss_is_seen_where_it_is_trained_on(tmp_path: Path, cls: type[Trainer]) -> None:
    trainer, plain = zo_trainer(tmp_path, cls=mixed(cls)), zo_trainer(tmp_path)
    for each in (trainer, plain):
        each.train()
    halves = [loss / 2 for loss in logged(plain, "loss")]
    assert logged(trainer, "projected_grad")[0] == pytest.approx(logged(plain, "projected_grad")[0] / 2, rel=1e-6)
    assert logged(trainer, "loss")[0] == pytest.approx(halves[0], rel=1e-6)


@pytest.mark.parametrize(("cls", "words"), [(Added, "adds .* outside of its"), (WithoutComputeLoss, "does not train")])
def test_a_loss_that_is_made_elsewhere_is_refused(tmp_path: Path, cls: type[Trainer], words: str) -> None:
    trainer = zo_trainer(tmp_path, cls=mixed(cls))
    with pytest.raises(ConfigError, match=words):
        trainer.train()
    assert not differing(weights(trainer.model), weights(tiny("llama")))
    assert all(parameter.grad is None for parameter in trainer.model.parameters()) or cls is WithoutComputeLoss
    assert "compute_loss" not in vars(trainer)
    assert "backward" not in vars(trainer.accelerator)


class Accuracy(ZOTrainer):
    """Trains on a score, as a Python number or a tensor."""

    as_number: bool

    def compute_loss(self, model: nn.Module, inputs: Batch, return_outputs: bool = False, **kwargs: Any) -> Any:
        output = model(input_ids=inputs["input_ids"])
        wrong = (output.logits[:, :-1].argmax(-1) != inputs["input_ids"][:, 1:]).float().mean()
        value = wrong.item() if self.as_number else wrong
        return (value, output) if return_outputs else value


@pytest.mark.parametrize("settings", PLACES[:2], ids=str)
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_python_number_is_a_loss(tmp_path: Path, settings: dict[str, Any], accumulated: int) -> None:
    ends = []
    for as_number in (True, False):
        config = ZOConfig(eps=0.1, num_probes=4, **settings)
        changes = {"learning_rate": 1e-2, "gradient_accumulation_steps": accumulated}
        trainer = zo_trainer(tmp_path, cls=Accuracy, zo_config=config, **changes)
        trainer.as_number = as_number
        trainer.train()
        ends.append((weights(trainer.model), logged(trainer, "loss"), trainer.evaluate(texts())["eval_loss"]))
    assert not differing(ends[0][0], ends[1][0])
    assert differing(ends[0][0], weights(tiny("llama")))
    assert ends[0][1:] == ends[1][1:]


class Silent(ZOTrainer):
    """A loss that has its gradient alone, as in GRPO with one iteration."""

    def compute_loss(self, model: nn.Module, inputs: Batch, **kwargs: Any) -> Tensor:
        loss = super().compute_loss(model, inputs, **kwargs)
        return torch.exp(loss - loss.detach())


def test_a_loss_without_a_slope_is_said_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = zo_trainer(tmp_path, cls=Silent)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert logged(trainer, "zo_skipped_steps") == [1.0] * 4
    assert len([message for message in caplog.messages if "agree exactly" in message]) == 1


# Which weights, and by which optimizer


class Head(nn.Module):
    """A classifier of its own, as a loss of sentence-transformers has."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.model, self.classifier = model, nn.Linear(64, 3)

    def forward(self, inputs: Batch) -> Tensor:
        logits = self.model(input_ids=inputs["input_ids"]).logits.mean(1)
        return F.cross_entropy(self.classifier(logits), inputs["input_ids"][:, 0] % 3)


class OwnsWeights(Trainer):
    """Trains what its loss owns beside the model."""

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        self.loss = Head(model)
        super().__init__(model, *args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: Batch, **kwargs: Any) -> Tensor:
        return self.loss(inputs)

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
        cls, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
        slow, fast = (list(part.parameters()) for part in (self.loss.model, self.loss.classifier))
        groups = [{"params": slow, "lr": args.learning_rate / 10}, {"params": fast}]
        return cls, {**settings, "optimizer_dict": [{**group, "weight_decay": 0.0} for group in groups]}


@pytest.mark.parametrize("settings", [*PLACES, {"rule": "torch"}, {"rule": "momentum"}], ids=str)
def test_weights_that_the_loss_owns_are_trained_at_their_own_rates(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = tiny("llama", tied=False)
    args = arguments(tmp_path, learning_rate=1e-3, max_steps=3)
    trainer = mixed(OwnsWeights)(model, args, train_dataset=texts(), zo_config=ZOConfig(**settings))
    before = copy.deepcopy(trainer.loss).state_dict()
    trainer.train()
    after = trainer.loss.state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    if settings == {}:
        head = (after["classifier.weight"] - before["classifier.weight"]).abs()
        body = (after["model.lm_head.weight"] - before["model.lm_head.weight"]).abs()
        entries = SeedLog.read(trainer._zo_journal.path).steps
        grads = sum(abs(sum(probe.coefficient for probe in entry.probes)) for entry in entries)
        rounding = 3 * torch.finfo(torch.float32).eps  # of three steps, at weights below 1
        assert head.max() <= 1e-3 * grads + rounding
        assert body.max() <= 1e-4 * grads + rounding
        assert head.max() > 2e-4 * grads


def adamw(trainer: Trainer) -> torch.optim.Optimizer:
    model = trainer.model
    body = [p for name, p in model.named_parameters() if "lm_head" not in name]
    return torch.optim.AdamW([{"params": body, "lr": 0.0}, {"params": model.lm_head.parameters(), "lr": 1e-3}])


class Layerwise(Trainer):
    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        self.optimizer = adamw(self)
        return self.optimizer


class ByClass(Trainer):
    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
        return torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9}


class FrontLayerwise(ZOTrainer):
    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        self.optimizer = adamw(self)
        return self.optimizer


def inner(trainer: Any) -> torch.optim.Optimizer:
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    return getattr(optimizer, "inner", optimizer)


@pytest.mark.parametrize("cls", [mixed(Layerwise), FrontLayerwise])
def test_an_optimizer_that_a_subclass_makes_does_the_updates(tmp_path: Path, cls: type[Any]) -> None:
    model = tiny("llama", tied=False)
    trainer = cls(model, arguments(tmp_path), train_dataset=texts())
    trainer.train()
    assert type(inner(trainer)) is torch.optim.AdamW
    assert set(differing(weights(model), weights(tiny("llama", tied=False)))) == {"lm_head.weight"}
    bare = tiny("llama", tied=False)
    zo = ZeroOrder(bare, optimizer=adamw(type("Of", (), {"model": bare})), seed=42)  # type: ignore[arg-type]
    run(zo, batches(bare, trainer.args, texts()), torch.optim.lr_scheduler.ConstantLR(zo.optimizer, factor=1.0))
    assert not differing(weights(model), weights(bare))


def test_a_rule_that_is_named_takes_the_groups_of_a_subclass(tmp_path: Path) -> None:
    model = tiny("llama", tied=False)
    config = ZOConfig(rule="momentum")
    trainer = mixed(Layerwise)(model, arguments(tmp_path), train_dataset=texts(), zo_config=config)
    trainer.train()
    assert set(differing(weights(model), weights(tiny("llama", tied=False)))) == {"lm_head.weight"}
    assert [group["lr"] for group in trainer.zo.optimizer.param_groups] == [0.0, 1e-3]


@pytest.mark.parametrize(
    ("make", "expected", "words"),
    [
        (lambda a: (ZOTrainer, a(optim="sgd", optim_args="momentum=0.9"), {}), torch.optim.SGD, "optim='sgd' says"),
        (
            lambda a: (ZOTrainer, a(), {"optimizer_cls_and_kwargs": (torch.optim.RMSprop, {"lr": 1e-4})}),
            torch.optim.RMSprop,
            "optimizer_cls_and_kwargs says",
        ),
        (lambda a: (mixed(ByClass), a(), {}), torch.optim.SGD, "get_optimizer_cls_and_kwargs says"),
    ],
    ids=["optim", "optimizer_cls_and_kwargs", "get_optimizer_cls_and_kwargs"],
)
def test_every_documented_way_to_choose_an_optimizer_counts(
    tmp_path: Path, make: Any, expected: type, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    cls, args, more = make(lambda **changes: arguments(tmp_path, **changes))
    trainer = cls(tiny("llama"), args, train_dataset=texts(), **more)
    trainer.train()
    assert type(inner(trainer)) is expected
    assert any(words in message for message in caplog.messages)


def test_without_a_choice_it_is_zeroth_order_sgd(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = zo_trainer(tmp_path, weight_decay=0.1)
    trainer.train()
    assert type(inner(trainer)).__name__ == "ZOOptimizer"
    assert not any("updates are left to" in message for message in caplog.messages)


def test_freezing_in_a_callback_freezes(tmp_path: Path) -> None:
    class Freeze(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 2:
                model.model.requires_grad_(False)
                kept.append(weights(model))

    class Reads(ZOTrainer):
        def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            flags.append(model.training)
            return super().compute_loss(model, *args, **kwargs)

    kept: list[dict[str, Tensor]] = []
    flags: list[bool] = []
    model = tiny("llama", tied=False)
    trainer = Reads(model, arguments(tmp_path, learning_rate=1e-3), train_dataset=texts(), callbacks=[Freeze()])
    trainer.train()
    assert set(differing(kept[0], weights(model))) == {"lm_head.weight"}
    assert all(flags)  # in the step in which the engine learns of it, too
