"""Law: under the trainers of Hugging Face and TRL, updates that wait are seen, saved and resumed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import arguments, differing, logged, texts, weights
from models import tiny
from transformers import AutoModelForCausalLM, Trainer
from trl import SFTTrainer
from trl_helpers import ZOSFTTrainer, sft

from hf_zo import ZOTrainer
from zo_core import LowRank, ZOConfig

CONFIG = ZOConfig(noise=LowRank(refresh=4), rule="momentum", lr=1e-3)


def trainer(path: Path, config: ZOConfig = CONFIG, **changes: Any) -> ZOTrainer:
    args = arguments(path, num_train_epochs=2, **changes)
    rows = texts(12)
    return ZOTrainer(model=tiny("llama"), args=args, train_dataset=rows, eval_dataset=rows[:8], zo_config=config)


@pytest.mark.parametrize("tier", [None, "disk"])
def test_a_run_resumed_inside_a_window_continues_bit_for_bit(tier: str | None, tmp_path: Path) -> None:
    config = CONFIG.replace(offload=tier)
    straight = trainer(tmp_path / "a", config, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2)
    straight.train()
    again = trainer(tmp_path / "b", config)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "out" / "checkpoint-2"))
    assert differing(weights(straight.model), weights(again.model)) == []


def test_evaluation_and_a_saved_model_have_the_updates_of_the_window(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=3, eval_strategy="steps", eval_steps=3)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert differing(weights(run.model), weights(saved)) == []
    plain = Trainer(model=saved, args=copy.copy(run.args), eval_dataset=run.eval_dataset)
    assert logged(run, "eval_loss") == [pytest.approx(plain.evaluate()["eval_loss"], abs=1e-6)]
    before = Trainer(model=tiny("llama"), args=copy.copy(run.args), eval_dataset=run.eval_dataset)
    assert abs(before.evaluate()["eval_loss"] - logged(run, "eval_loss")[0]) > 1e-3


def test_trl_multiplies_by_the_weights_of_its_head_as_they_should_be(tmp_path: Path, tokenizer: Any) -> None:
    run = sft(tmp_path, tokenizer, ZOSFTTrainer, zo_config=CONFIG, max_steps=3, eval_strategy="steps", eval_steps=3)
    run.train()
    assert run.zo.oracle.realisation.whole is False
    plain = sft(tmp_path, tokenizer, SFTTrainer, bf16=True)
    plain.model.load_state_dict(run.model.state_dict())
    # Under autocast to bfloat16, whose rounding the two ways do not share.
    assert logged(run, "eval_loss") == [pytest.approx(plain.evaluate()["eval_loss"], abs=2e-3)]
    assert all(torch.isfinite(value).all() for value in weights(run.model).values())
