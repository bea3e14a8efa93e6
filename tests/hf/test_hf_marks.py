"""Law: `ZOTrainer` goes on from checkpoints of its own kind, and says whose another one is and what to do with it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from hf_helpers import arguments, differing, texts, weights, zo_trainer
from models import tiny
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, Trainer
from transformers.trainer import SCALER_NAME

from hf_zo import ZOTrainer, ZOTrainingArguments
from zo_core import SeedLog, StateError

DATA = Path(__file__).parents[1] / "data" / "v0_1" / "hf"
SAVING = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}


def bnb(model: Any) -> torch.optim.Optimizer:
    groups = [[p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim < 2]]
    return bitsandbytes.optim.AdamW32bit([{"params": group} for group in groups], lr=1e-3)


def backpropagated(path: Path, optim: str | None) -> str:
    """The checkpoint of a plain `Trainer`."""
    model = tiny("llama")
    args = arguments(path, **SAVING, **({} if optim is None else {"optim": optim}))
    optimizers = (bnb(model), None) if optim is None else (None, None)
    Trainer(model=model, args=args, train_dataset=texts(), optimizers=optimizers).train()
    return str(path / "out" / "checkpoint-2")


@pytest.mark.parametrize(
    ("optim", "writer"),
    [("adamw_torch", "AdamW or Adam"), ("sgd", "SGD"), ("adafactor", "Adafactor"), (None, "bitsandbytes")],
)
def test_the_checkpoint_of_a_plain_trainer_is_refused_with_two_ways_out(
    optim: str | None, writer: str, tmp_path: Path
) -> None:
    path = backpropagated(tmp_path, optim)
    for given, rule in (
        ({"cls": ZOTrainer}, r"zo_config=ZOConfig\(rule='torch'\)"),
        ({"cls": ZOTrainer, "zo_eps": 1e-3}, "zo_rule='torch'"),
    ):
        trainer = own_trainer(tmp_path / "zo", **given)
        with pytest.raises(
            StateError,
            match=rf"written by {writer}, and zeroth-order training has a ZOOptimizer; load the weights alone, with "
            rf"from_pretrained\(checkpoint\), and call train\(\) without resume_from_checkpoint; or write {rule}",
        ):
            trainer.train(resume_from_checkpoint=path)


def own_trainer(path: Path, **changes: Any) -> Any:
    if not any(name.startswith("zo_") for name in changes):
        return zo_trainer(path, **SAVING, **changes)
    changes.pop("cls", None)
    args = arguments(path, ZOTrainingArguments, **SAVING, **changes)
    return ZOTrainer(model=tiny("llama"), args=args, train_dataset=texts())


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_the_torch_rule_goes_on_from_the_checkpoint_of_a_plain_trainer(optim: str, tmp_path: Path) -> None:
    path = backpropagated(tmp_path, optim)
    trainer = own_trainer(tmp_path / "zo", zo_rule="torch", optim=optim)
    trainer.train(resume_from_checkpoint=path)
    assert trainer.state.global_step == 4
    assert trainer.zo.step_count == 4
    before = load_file(Path(path) / "model.safetensors")
    assert any(not torch.equal(before[name], weights(trainer.model)[name]) for name in before)
    other = own_trainer(tmp_path / "other", zo_rule="torch", optim="rmsprop")
    with pytest.raises(StateError, match=r"written by (AdamW or Adam|SGD), and this run has RMSprop"):
        other.train(resume_from_checkpoint=path)


def test_a_checkpoint_of_backpropagation_in_fp16_has_a_scaler_that_nobody_needs(tmp_path: Path) -> None:
    path = backpropagated(tmp_path, "adamw_torch")
    scale = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
    torch.save({**scale, "_growth_tracker": 0}, Path(path) / SCALER_NAME)
    trainer = own_trainer(tmp_path / "zo", zo_rule="torch", optim="adamw_torch")
    trainer.train(resume_from_checkpoint=path)
    assert trainer.state.global_step == 4


def test_the_checkpoint_of_a_run_with_adamw_is_not_one_of_our_own_rules(tmp_path: Path) -> None:
    own_trainer(tmp_path, zo_rule="torch").train()
    trainer = own_trainer(tmp_path, zo_rule="auto", zo_eps=1e-3)
    with pytest.raises(StateError, match=r"zo_rule='torch'.* zo_rule='sgd'"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


@pytest.mark.parametrize("resume", [True, "checkpoint-2"], ids=["with the log", "by name"])
def test_a_run_of_version_0_1_is_gone_on_with(resume: bool | str, tmp_path: Path) -> None:
    def trainer(path: Path, **changes: Any) -> Any:
        shutil.copytree(DATA, path / "out", dirs_exist_ok=True)
        model = LlamaForCausalLM.from_pretrained(DATA / "checkpoint-2")
        settings = {"zo_rule": "momentum", "learning_rate": 1e-3, "max_steps": 4, **changes}
        args = arguments(path, ZOTrainingArguments, save_strategy="steps", save_steps=2, **settings)
        return ZOTrainer(model=model, args=args, train_dataset=texts())

    run = trainer(tmp_path)
    found = resume if resume is True else str(tmp_path / "out" / resume)
    run.train(resume_from_checkpoint=found)
    assert run.state.global_step == 4
    log, old = SeedLog.read(tmp_path / "out" / "seedlog.zo"), SeedLog.read(DATA / "seedlog.zo")
    kept = 3 if resume is True else 2
    assert [entry.probes for entry in log.steps[:kept]] == [entry.probes for entry in old.steps[:kept]]
    assert len(log.steps) == 4
    # The new checkpoint has a mark, and goes on to the same weights.
    again = trainer(tmp_path / "again")
    shutil.copytree(tmp_path / "out", tmp_path / "again" / "out", dirs_exist_ok=True)
    again.train(resume_from_checkpoint=str(tmp_path / "again" / "out" / "checkpoint-4"))
    assert differing(weights(run.model), weights(again.model)) == []
    with pytest.raises(StateError, match=r"zo_eps=0.001, and this one has zo_eps=0.01"):
        trainer(tmp_path / "eps", zo_eps=1e-2).train(resume_from_checkpoint=True)
