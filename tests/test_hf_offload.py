"""Law: `ZOTrainer` with a streamed model does what it does with a resident one, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import arguments, differing, texts, weights
from models import tiny
from transformers import AutoModelForCausalLM

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
