"""Law: a step measures the loss that `Trainer` would compute, whatever makes it, and leaves no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_helpers import Batch, bare_loop, batches, differing, texts, weights, zo_trainer
from models import tiny
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_pt_utils import LabelSmoother

from hf_zo import ZOTrainer, ZOTrainerMixin
from zo_core import ZOConfig

# Losses


def squared(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    wanted = F.one_hot(labels.clamp(min=0), outputs.logits.shape[-1]).float()
    return F.mse_loss(outputs.logits, wanted, reduction="sum") / num_items_in_batch


def test_compute_loss_func_is_the_loss(tmp_path: Path) -> None:
    trainer, bare = zo_trainer(tmp_path, compute_loss_func=squared), tiny("llama")
    trainer.train()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        labels, count = batch.pop("labels"), batch.pop("num_items_in_batch")
        return squared(model(**batch), labels, count)

    bare_loop(bare, trainer.args, texts(), loss)
    assert not differing(weights(trainer.model), weights(bare))


def test_label_smoothing_is_part_of_the_loss(tmp_path: Path) -> None:
    trainer, bare = zo_trainer(tmp_path, label_smoothing_factor=0.3), tiny("llama")
    trainer.train()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        labels, count = batch.pop("labels"), batch.pop("num_items_in_batch")
        return LabelSmoother(0.3)(model(**batch), labels, shift_labels=True, num_items_in_batch=count)

    bare_loop(bare, trainer.args, texts(), loss)
    assert not differing(weights(trainer.model), weights(bare))


class Popping(ZOTrainer):
    """Takes its inputs apart and writes into them, as some trainers do."""

    keys: list[list[str]]

    def compute_loss(self, model: nn.Module, inputs: Batch, **_: Any) -> Tensor:
        self.keys.append(sorted(inputs))
        labels = inputs.pop("labels")
        inputs["use_cache"] = False
        return F.cross_entropy(model(**inputs).logits.flatten(0, 1), labels.flatten())


def test_a_loss_may_take_its_inputs_apart_because_each_probe_has_its_own(tmp_path: Path) -> None:
    trainer, bare = zo_trainer(tmp_path, cls=Popping), tiny("llama")
    trainer.keys = []
    trainer.train()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(input_ids=batch["input_ids"]).logits.flatten(0, 1), batch["labels"].flatten())

    bare_loop(bare, trainer.args, texts(), loss)
    assert trainer.keys == [["input_ids", "labels"]] * 9  # the first step measures one point twice
    assert not differing(weights(trainer.model), weights(bare))


class Preparing(Trainer):
    """Counts its calls, and prepares a second batch of its own on the way to the loss."""

    prepared: list[Any]

    def _prepare_inputs(self, inputs: Any) -> Any:
        self.prepared.append(inputs)
        return super()._prepare_inputs(inputs)

    def compute_loss(self, model: nn.Module, inputs: Batch, **kwargs: Any) -> Tensor:
        other = self._prepare_inputs({"other": torch.ones(1)})
        assert list(other) == ["other"]
        return super().compute_loss(model, inputs, **kwargs)


class ZOPreparing(ZOTrainerMixin, Preparing):
    pass


def test_a_batch_is_prepared_once_for_all_probes_and_left_as_it_came(tmp_path: Path) -> None:
    trainer = zo_trainer(tmp_path, cls=ZOPreparing, gradient_accumulation_steps=2, label_smoothing_factor=0.1)
    trainer.prepared = []
    trainer.train()
    of_the_loader = [inputs for inputs in trainer.prepared if "other" not in inputs]
    assert len(of_the_loader) == 4
    assert all(sorted(inputs) == ["input_ids", "labels"] for inputs in of_the_loader)


# Leaving no trace


class Spying(ZOTrainer):
    """Notes the modes that each forward finds, and the state of the random generator around each step."""

    modes: list[tuple[bool, set[bool]]]
    draws: list[bool]

    def compute_loss(self, model: nn.Module, inputs: Batch, **kwargs: Any) -> Tensor:
        root, *others = model.modules()
        self.modes.append((root.training, {module.training for module in others}))
        return super().compute_loss(model, inputs, **kwargs)

    def training_step(self, *args: Any) -> Tensor:
        before = torch.get_rng_state()
        loss = super().training_step(*args)
        self.draws.append(not torch.equal(before, torch.get_rng_state()))
        assert all(module.training for module in self.model.modules())
        assert "backward" not in vars(self.accelerator)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in self.model.modules())
        assert not loss.requires_grad
        return loss


@pytest.mark.parametrize("dropout", [False, True])
def test_only_the_root_trains_during_a_probe_and_everything_after_it(tmp_path: Path, dropout: bool) -> None:
    trainer = zo_trainer(tmp_path, "bert", Spying, zo_config=ZOConfig(dropout=dropout))
    trainer.modes, trainer.draws = [], []
    trainer.train()
    assert trainer.modes == [(True, {dropout})] * 9  # the first step measures one point twice
    assert trainer.draws == [dropout] * 4
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_with_dropout_a_step_draws_what_one_forward_draws(tmp_path: Path) -> None:
    trainer = zo_trainer(tmp_path, "bert", zo_config=ZOConfig(dropout=True), max_steps=1)
    trainer.train()
    batch = batches(tiny("bert"), trainer.args, texts())[0][0]
    torch.manual_seed(0)
    trainer.training_step(trainer.model, batch)
    drawn = torch.rand(4)
    torch.manual_seed(0)
    tiny("bert")(**batch)
    assert torch.equal(drawn, torch.rand(4))


class Failing(ZOTrainer):
    def compute_loss(self, model: nn.Module, inputs: Batch, **kwargs: Any) -> Tensor:
        super().compute_loss(model, inputs, **kwargs)
        raise KeyError("the loss failed")


def test_an_exception_in_the_loss_comes_out_and_leaves_no_trace(tmp_path: Path) -> None:
    trainer = zo_trainer(tmp_path, cls=Failing)
    with pytest.raises(KeyError, match="the loss failed"):
        trainer.train()
    assert not differing(weights(trainer.model), weights(tiny("llama")))
    assert all(module.training for module in trainer.model.modules())
    assert "backward" not in vars(trainer.accelerator)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trainer.model.modules())
