"""Laws: `ZOTrainer` with ``backprop`` is the bare loop with it, bit for bit, and resumes from its checkpoints."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import arguments, batches, differing, groups, logged, run, texts, weights, zo_trainer
from models import tiny
from transformers import get_scheduler

from hf_zo import ZOTrainer, ZOTrainingArguments
from zo_core import ConfigError, ZeroOrder, ZOConfig, ZOOptimizer

CONFIG = ZOConfig(backprop=("lm_head", "model.layers.1"), backprop_lr=1e-2)
SCHEDULE = {"lr_scheduler_type": "linear", "warmup_steps": 1, "weight_decay": 0.1}


@pytest.mark.parametrize(
    "changes",
    [
        {"max_grad_norm": 0.0},
        {"max_grad_norm": 0.5, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    ],
    ids=["schedule and decay", "accumulation and clipping"],
)
def test_it_is_the_bare_loop(tmp_path: Path, changes: dict[str, Any]) -> None:
    args = arguments(tmp_path, **SCHEDULE, **changes)
    trainer = ZOTrainer(model=tiny("llama"), args=args, train_dataset=texts(), zo_config=CONFIG)
    trainer.train()
    model = tiny("llama")
    optimizer = ZOOptimizer(groups(model, args), lr=args.learning_rate)
    zo = ZeroOrder(model, CONFIG.replace(seed=args.seed), optimizer=optimizer)
    assert zo.backprop is not None
    zo.backprop.max_norm = args.max_grad_norm or None
    steps = batches(model, args, texts())
    run(zo, steps, get_scheduler(args.lr_scheduler_type, zo.optimizer, 1, len(steps)))
    assert not differing(weights(trainer.model), weights(model))
    assert logged(trainer, "grad_norm")[-1] == zo.backprop.norm > 0
    decays = {group["weight_decay"] for group in zo.backprop.optimizer.param_groups}  # type: ignore[union-attr]
    assert decays == {0.0, 0.1}


class FirstToken(ZOTrainer):
    """Its loss ignores the number of tokens, so that Trainer divides it by the number of micro-batches."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return first_token(model, inputs)


def first_token(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    return model(input_ids=batch["input_ids"]).logits[:, 0].float().logsumexp(-1).mean()


def test_gradients_are_scaled_as_the_loss_is(tmp_path: Path) -> None:
    settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0}
    config = CONFIG.replace(lr=0.0)
    trainer = zo_trainer(tmp_path, cls=FirstToken, zo_config=config, max_steps=1, **settings)
    trainer.model_accepts_loss_kwargs = False
    trainer.train()
    plain = tiny("llama").train(False)
    named = [*plain.lm_head.parameters(), *plain.model.layers[1].parameters()]
    adamw = torch.optim.AdamW(named, lr=1e-2, weight_decay=0.0)
    for batch in batches(plain, arguments(tmp_path, **settings), texts())[0]:
        (first_token(plain, batch) / 2).backward()
    adamw.step()
    assert not differing(weights(trainer.model), weights(plain))


def test_a_resumed_run_is_the_whole_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def trainer(path: Path, **changes: Any) -> Any:
        return zo_trainer(path, zo_config=CONFIG, save_strategy="steps", save_steps=2, **SCHEDULE, **changes)

    whole = trainer(tmp_path / "whole")
    with caplog.at_level(logging.WARNING, "hf_zo"):
        whole.train()
    assert "no seed log" in caplog.text
    assert not list(tmp_path.rglob("seedlog*"))
    again = trainer(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-2"))
    assert not differing(weights(again.model), weights(whole.model))


@pytest.mark.parametrize("tier", ["cpu", "disk"])
def test_streamed_is_resident(tmp_path: Path, tier: str) -> None:
    def trained(offload: str | None, resume: str | None = None) -> Any:
        folder = tmp_path / str(offload)
        model, rows = tiny("llama", tied=False), texts()
        settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, **SCHEDULE}
        args = arguments(folder, gradient_accumulation_steps=2, **settings)
        how = {"train_dataset": rows, "eval_dataset": rows[:4], "zo_config": CONFIG.replace(offload=offload)}
        trainer = ZOTrainer(model=model, args=args, **how)
        trainer.train(resume_from_checkpoint=resume)
        return weights(trainer.model), logged(trainer, "eval_loss"), logged(trainer, "grad_norm")

    resident, streamed = trained(None), trained(tier)
    assert not differing(streamed[0], resident[0])
    assert streamed[1:] == resident[1:]
    again = trained(tier, str(tmp_path / tier / "out" / "checkpoint-1"))
    assert not differing(again[0], resident[0])


def test_arguments_name_the_modules_and_fp16_is_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path, ZOTrainingArguments, zo_backprop=["lm_head"], zo_backprop_lr=1e-3)
    assert args.to_zo_config() == ZOConfig(backprop=("lm_head",), backprop_lr=1e-3)
    with pytest.raises(ConfigError, match="bf16=True"):
        zo_trainer(tmp_path, zo_config=CONFIG, fp16=True)
