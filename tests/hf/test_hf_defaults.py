"""Law: a script that chooses nothing learns, and what it chooses counts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import arguments, differing, texts
from models import tiny
from peft import LoraConfig, PromptEncoderConfig, get_peft_model
from traces import weights
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments, set_seed

from hf_zo import ZOTrainer, ZOTrainingArguments
from zo_core import ZeroOrder, ZOConfig
from zo_core.defaults import NEWTON
from zo_core.normaliser import CURVATURE, GRADIENT

Rows = list[dict[str, Any]]


def words(count: int, seed: int) -> Rows:
    """Rows of 12 tokens; the label says whether more of them are below 16 than above."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 32, (count, 12), generator=generator)
    return [{"input_ids": row, "labels": torch.tensor(int((row < 16).sum() > 6))} for row in tokens]


def classifier() -> BertForSequenceClassification:
    set_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=32, max_position_embeddings=12, num_labels=2, **sizes))


def open_arguments(path: Path, **changes: Any) -> ZOTrainingArguments:
    """Arguments without a learning rate or a schedule."""
    quiet = {"use_cpu": True, "dataloader_pin_memory": False, "report_to": "none", "disable_tqdm": True}
    return ZOTrainingArguments(str(path), save_strategy="no", per_device_train_batch_size=32, **quiet, **changes)


@pytest.mark.parametrize(
    ("steps", "settings"),
    [
        (200, {}),
        pytest.param(60, {"zo_estimator": "fzoo"}, marks=pytest.mark.slow),
        pytest.param(150, {"zo_rule": "momentum"}, marks=pytest.mark.slow),
        (150, {"zo_noise": "low_rank"}),
        pytest.param(60, {"zo_num_probes": 4}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_nothing_chosen_and_the_model_learns(steps: int, settings: dict[str, Any], tmp_path: Path) -> None:
    model = classifier()
    args = open_arguments(tmp_path, max_steps=steps, logging_steps=steps // 6, **settings)
    trainer = ZOTrainer(model=model, args=args, train_dataset=words(1024, 0), eval_dataset=words(512, 1))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    # Backpropagation ends near 0.1. A rate of 1e-6, which nobody chose, moved the loss by 1e-5.
    assert after < before - 0.01
    shown = [line["zo_lr"] for line in trainer.state.log_history if "zo_lr" in line]
    assert shown == sorted(shown, reverse=True)
    assert shown[-1] < shown[0] / 10


@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_one_line_says_which_rate_was_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, warmup_steps: int
) -> None:
    args = open_arguments(tmp_path, max_steps=2, warmup_steps=warmup_steps)
    ZOTrainer(model=classifier(), args=args, train_dataset=words(64, 0)).train()
    (line,) = [line for line in caplog.messages if "learning rate" in line]
    assert line.startswith("no learning rate was given: steps are normalised by the curvature that they measure")
    assert "with a rate of 0.25," in line


def test_without_arguments_a_trainer_makes_its_own() -> None:
    trainer = ZOTrainer(model=classifier(), train_dataset=words(8, 0))
    assert isinstance(trainer.args, ZOTrainingArguments)
    assert trainer.args.learning_rate is None


@pytest.mark.parametrize(
    ("args", "config"),
    [
        ({"cls": TrainingArguments, "learning_rate": 5e-5}, None),  # also the default of these arguments
        ({"cls": ZOTrainingArguments, "learning_rate": 5e-5}, None),
        ({"cls": ZOTrainingArguments, "learning_rate": 1.0, "zo_learning_rate": 5e-5}, None),
        ({"cls": TrainingArguments, "learning_rate": 1.0}, ZOConfig(lr=5e-5)),
    ],
    ids=["TrainingArguments", "ZOTrainingArguments", "zo_learning_rate", "zo_config"],
)
def test_a_rate_that_is_given_counts(args: dict[str, Any], config: ZOConfig | None, tmp_path: Path) -> None:
    own = arguments(tmp_path, max_steps=1, **args)
    trainer = ZOTrainer(model=tiny("llama"), args=own, train_dataset=texts(), zo_config=config)
    trainer.train()
    assert trainer.zo is not None
    assert (trainer.zo.lr, trainer.zo.normaliser) == (5e-5, None)


def test_an_optimizer_of_torch_without_a_rate_gets_one(tmp_path: Path) -> None:
    args = open_arguments(tmp_path, max_steps=1, optim="adamw_torch", lr_scheduler_type="constant", zo_rule="torch")
    trainer = ZOTrainer(model=classifier(), args=args, train_dataset=words(32, 0))
    trainer.train()
    assert trainer.zo is not None
    assert trainer.zo.normaliser is not None
    assert trainer.zo.normaliser.name == GRADIENT
    count = sum(parameter.numel() for parameter in trainer.model.parameters())
    assert trainer.zo.lr == pytest.approx(0.06 / count**0.5)


def test_eps_is_that_of_what_is_trained() -> None:
    assert ZeroOrder(tiny("llama")).eps == 1e-3
    assert ZeroOrder(get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"]))).eps == 1e-2
    prefix = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8)
    assert ZeroOrder(get_peft_model(tiny("llama"), prefix)).eps == 1e-1
    assert ZeroOrder(tiny("llama"), eps=1e-3).eps == 1e-3


def test_the_default_is_the_one_that_is_documented() -> None:
    zo = ZeroOrder(tiny("llama"))
    assert zo.normaliser is not None
    assert (zo.lr, zo.normaliser.name) == (NEWTON, CURVATURE)


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_accumulation_steps": 2}, {"zo_offload": "cpu", "gradient_accumulation_steps": 2}],
    ids=str,
)
def test_a_run_without_a_rate_resumes_bit_for_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    """From its checkpoint, and from the steps that only the log has; the loss in the log counts the third point."""
    run = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "logging_steps": 1, **settings}
    run |= {"learning_rate": None, "lr_scheduler_type": "linear"}
    trainers = []
    for resume in (False, True):
        args = arguments(tmp_path, ZOTrainingArguments, **run)
        trainer = ZOTrainer(model=tiny("llama"), args=args, train_dataset=texts(64))
        if resume:
            for later in ("checkpoint-6", "checkpoint-8"):  # steps 3 to 7 come from the log
                shutil.rmtree(tmp_path / "out" / later)
        trainer.train(resume_from_checkpoint=resume)
        trainers.append(trainer)
    whole, resumed = trainers
    assert whole.zo is not None
    assert resumed.zo is not None
    assert not differing(weights(whole.model), weights(resumed.model))
    assert resumed.zo.normaliser == whole.zo.normaliser
    assert resumed.zo.braking.saved() == whole.zo.braking.saved()
    losses = [[line["loss"] for line in trainer.state.log_history if "loss" in line] for trainer in trainers]
    # The trainer adds the losses of two micro-batches in float32, and the log has their mean: one rounding apart.
    unit = 2.0**-23 if "gradient_accumulation_steps" in settings else 0.0
    assert losses[1] == pytest.approx(losses[0], rel=unit, abs=0.0)
