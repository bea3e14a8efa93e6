"""Law: the update is done by whatever optimizer `Trainer` would have used, if one is asked for, as in a bare loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from hf_helpers import Batch, arguments, batches, differing, groups, logged, run, texts, weights, zo_trainer
from models import tiny
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from hf_zo import ZOTrainer, ZOTrainingArguments
from zo_core import ZeroOrder, ZOConfig


def test_a_torch_optimizer_and_scheduler_that_are_passed_do_the_update(tmp_path: Path) -> None:
    def pair(model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=3)

    trainer, bare = zo_trainer(tmp_path, optimizers=pair), tiny("llama")
    trainer.train()
    optimizer, scheduler = pair(bare)
    zo = ZeroOrder(bare, optimizer=optimizer, seed=42)
    records = run(zo, batches(bare, trainer.args, texts()), scheduler)
    assert not differing(weights(trainer.model), weights(bare))
    assert [record.lr for record in records] == pytest.approx([1e-5 / 3, 5e-5 / 9, 7e-5 / 9, 1e-5])


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_rule_torch_takes_the_optimizer_that_the_arguments_name(tmp_path: Path, optim: str) -> None:
    trainer = zo_trainer(tmp_path, optim=optim, weight_decay=0.1, zo_config=ZOConfig(rule="torch"))
    trainer.train()
    bare = tiny("llama")
    cls, settings = Trainer.get_optimizer_cls_and_kwargs(trainer.args)
    zo = ZeroOrder(bare, optimizer=cls(groups(bare, trainer.args), **settings), seed=42)
    run(zo, batches(bare, trainer.args, texts()), torch.optim.lr_scheduler.ConstantLR(zo.optimizer, factor=1.0))
    assert not differing(weights(trainer.model), weights(bare))
    assert differing(weights(bare), weights(tiny("llama")))


def test_a_run_with_adamw_resumes_bit_for_bit(tmp_path: Path) -> None:
    settings = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "linear"}
    runs = []
    for resume in (None, str(tmp_path / "out" / "checkpoint-3")):
        trainer = zo_trainer(tmp_path, zo_config=ZOConfig(rule="torch"), **settings)
        trainer.train(resume_from_checkpoint=resume)
        runs.append(weights(trainer.model))
    assert not differing(*runs)


def test_a_fresh_optimizer_serves_each_model_of_a_hyperparameter_search(tmp_path: Path) -> None:
    used: list[tuple[float, float]] = []

    class Note(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            used.append((optimizer.param_groups[0]["lr"], trainer.zo.eps))

    args = arguments(tmp_path, ZOTrainingArguments, eval_strategy="epoch", max_steps=1)
    trainer = ZOTrainer(
        model_init=lambda: tiny("llama"), args=args, train_dataset=texts(), eval_dataset=texts(4), callbacks=[Note()]
    )
    space = {"learning_rate": [1e-6, 2e-6], "zo_eps": [1e-2]}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    best = trainer.hyperparameter_search(
        lambda trial: {name: trial.suggest_categorical(name, values) for name, values in space.items()},
        n_trials=2, backend="optuna", sampler=optuna.samplers.GridSampler(space, seed=0),
    )  # fmt: skip
    assert sorted(used) == [(1e-6, 1e-2), (2e-6, 1e-2)]
    assert best.hyperparameters["learning_rate"] in space["learning_rate"]


class OutOfMemory(ZOTrainer):
    """Memory lasts for one probe with all 16 rows."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls: list[int] = []  # a number would begin with the same value in each probe

    def compute_loss(self, model: nn.Module, inputs: Batch, **kwargs: Any) -> Tensor:
        self.calls.append(len(inputs["input_ids"]))
        if self.calls == [16, 16]:
            raise RuntimeError("CUDA out of memory.")
        return super().compute_loss(model, inputs, **kwargs)


def test_auto_find_batch_size_starts_again_with_fewer_rows_from_untouched_weights(tmp_path: Path) -> None:
    trainer = zo_trainer(tmp_path, cls=OutOfMemory, auto_find_batch_size=True, per_device_train_batch_size=16)
    trainer.train()
    assert trainer._train_batch_size == 14
    fewer = zo_trainer(tmp_path, per_device_train_batch_size=14)
    fewer.train()
    assert logged(trainer, "projected_grad") == logged(fewer, "projected_grad")
    assert not differing(weights(trainer.model), weights(fewer.model))
