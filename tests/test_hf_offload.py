"""Law: `ZOTrainer` with a streamed model does what it does with a resident one, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import arguments, differing, texts, weights
from models import tiny
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

from hf_zo import ZOTrainer, ZOTrainingArguments

TIERS = ("cpu", "disk")


def trainer(path: Path, tier: str | None, **changes: Any) -> ZOTrainer:
    torch.manual_seed(0)
    where = {"zo_offload_dir": str(path / "blocks")} if tier == "disk" else {}
    settings = {"learning_rate": 1e-3, "zo_rule": "momentum", "zo_offload": tier, **where, **changes}
    rows = texts(24)
    return ZOTrainer(
        model=tiny("llama"),
        args=arguments(path, ZOTrainingArguments, **settings),
        train_dataset=rows,
        eval_dataset=rows[:8],
    )


@pytest.mark.parametrize("tier", TIERS)
def test_training_evaluating_and_predicting_are_those_of_a_resident_model(tier: str, tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 2, "gradient_accumulation_steps": 2, "weight_decay": 0.1}
    runs = [trainer(tmp_path / str(where), where, **settings) for where in (None, tier)]
    for run in runs:
        run.train()
    resident, streamed = runs
    timed = ("runtime", "per_second", "preparation_time")
    histories = [
        [{k: v for k, v in entry.items() if not any(word in k for word in timed)} for entry in run.state.log_history]
        for run in runs
    ]
    assert histories[0] == histories[1]
    assert differing(weights(resident.model), weights(streamed.model)) == []
    a, b = (run.predict(run.eval_dataset).predictions for run in runs)
    assert (a == b).all()


@pytest.mark.parametrize("tier", TIERS)
def test_a_resumed_run_continues_bit_for_bit(tier: str, tmp_path: Path) -> None:
    straight = trainer(tmp_path / "straight", tier, save_strategy="steps", save_steps=3)
    straight.train()
    again = trainer(tmp_path / "again", tier)
    again.train(resume_from_checkpoint=str(tmp_path / "straight" / "out" / "checkpoint-3"))
    assert differing(weights(straight.model), weights(again.model)) == []


@pytest.mark.parametrize("tier", TIERS)
def test_a_saved_model_loads_as_it_was_trained(tier: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, tier)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert differing(weights(run.model), weights(loaded)) == []


def test_no_probe_sees_the_modes_of_another(tmp_path: Path) -> None:
    """The first probe ends, and sets the modes back, before the others come to the dropout in front of the head."""
    runs = []
    for tier in (None, "cpu"):
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
        model = BertForSequenceClassification(BertConfig(vocab_size=64, hidden_dropout_prob=0.5, **shape))
        rows = [{"input_ids": row["input_ids"], "labels": index % 2} for index, row in enumerate(texts())]
        args = arguments(tmp_path / str(tier), ZOTrainingArguments, learning_rate=1e-3, zo_offload=tier)
        runs.append(ZOTrainer(model=model, args=args, train_dataset=rows))
        runs[-1].train()
    assert differing(*(weights(run.model) for run in runs)) == []
    grads = [[entry.get("projected_grad") for entry in run.state.log_history] for run in runs]
    assert grads[0] == grads[1]


def test_what_a_trainer_counts_in_its_loss_counts_once(tmp_path: Path) -> None:
    class Counting(ZOTrainer):
        before, after = 0, 0

        def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.before += 1
            result = super().compute_loss(model, *args, **kwargs)
            self.after += 1
            return result

    args = arguments(tmp_path, ZOTrainingArguments, zo_offload="cpu", zo_num_probes=2)
    run = Counting(model=tiny("llama"), args=args, train_dataset=texts())
    run.before = run.after = 0
    run.train()
    assert (run.before, run.after) == (4, 4)
