"""Law: `ZOTrainer` goes back when the loss has risen, and a run that did so resumes bit for bit, however it ended."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import differing, logged, seedlog_trainer, weights
from killing import apart, killed
from models import tiny
from safetensors.torch import load_file, save_model
from transformers import TrainerCallback

from hf_zo import ZOTrainer
from zo_core import SeedLog, replay
from zo_core.seedlog.__main__ import summary

ROOT = Path(__file__).parents[2]
LOG = "seedlog.zo"
#: A rate that is far too high for the tiny model: its loss goes from 4 to more than a thousand within ten steps.
TOO_HIGH: dict[str, Any] = {"learning_rate": 0.3, "num_train_epochs": 11, "lr_scheduler_type": "constant"}
CHECKPOINTS = {"save_strategy": "steps", "save_steps": 9}
STREAMED = {"zo_offload": "cpu", "zo_rule": "momentum"}


def final(trainer: Any) -> dict[str, torch.Tensor]:
    trainer.zo.close()
    return weights(trainer.model)


def test_a_rate_that_is_too_high_is_braked_and_the_run_ends_no_worse_than_it_began(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = seedlog_trainer(tmp_path, **{**TOO_HIGH, "num_train_epochs": 25})
    trainer.train()
    losses = logged(trainer, "loss")
    assert trainer.zo.optimizer.factor < 1
    assert sum(losses[-8:]) / 8 < 1.25 * losses[0]
    assert max(losses) > 10 * losses[0]
    lines = [line for line in caplog.messages if "the weights go back to those before step" in line]
    log = SeedLog.read(tmp_path / "out" / LOG)
    assert len(lines) == sum(entry.rollback is not None for entry in log.steps) > 1
    assert sum(line.startswith("rollback") for line in summary(log)) == len(lines)
    model = tiny("llama")
    replay(model, log)
    assert differing(final(trainer), weights(model)) == []


def test_a_brake_that_only_warns_names_the_argument(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = seedlog_trainer(tmp_path, zo_brake="warn", **{**TOO_HIGH, "num_train_epochs": 3})
    trainer.train()
    assert trainer.zo.optimizer.factor == 1.0
    (line,) = [line for line in caplog.messages if "the loss has risen" in line]
    assert line.endswith("take a lower learning rate; zo_brake='rollback' goes back and halves it")


class Interrupt(TrainerCallback):
    """Ctrl-C after a step."""

    def __init__(self, after: int):
        self.after: int | None = after

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.after:
            self.after = None
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("variant", "saving"),
    [
        pytest.param({}, CHECKPOINTS, id="resident-checkpoints"),
        pytest.param(STREAMED, {}, id="streamed-log alone"),
        pytest.param({}, {}, id="resident-log alone", marks=pytest.mark.slow),
        pytest.param(STREAMED, CHECKPOINTS, id="streamed-checkpoints", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_interrupted_goes_on_in_the_same_process(
    variant: dict[str, Any], saving: dict[str, Any], tmp_path: Path
) -> None:
    whole = seedlog_trainer(tmp_path / "whole", **TOO_HIGH, **variant)
    whole.train()
    trainer = seedlog_trainer(tmp_path / "stopped", **TOO_HIGH, **variant, **saving, callbacks=[Interrupt(30)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    done = [entry.rollback for entry in SeedLog.read(tmp_path / "stopped" / "out" / LOG).steps]
    assert any(done), "the interrupt came before the first rollback"
    trainer.train(resume_from_checkpoint=True)
    assert trainer.zo.optimizer.factor == whole.zo.optimizer.factor < 1
    assert differing(final(whole), final(trainer)) == []
    one, other = (SeedLog.read(tmp_path / name / "out" / LOG) for name in ("whole", "stopped"))
    assert [(e.probes, e.lrs, e.rollback) for e in one.steps] == [(e.probes, e.lrs, e.rollback) for e in other.steps]


# A run that is killed

KILLS = 12


def train(folder: Path, tier: str | None) -> None:
    """What the process does: trains, or goes on with what is there, and writes the final weights."""
    resume = (folder / "out" / LOG).exists() or None
    offload = {"zo_offload": tier, "zo_offload_dir": str(folder / "blocks")} if tier else {}
    trainer = seedlog_trainer(
        folder, cls=ZOTrainer, model=tiny("llama", dtype=torch.bfloat16), zo_rule="momentum", save_strategy="steps",
        save_steps=7, save_total_limit=2, logging_strategy="no", **{**TOO_HIGH, "learning_rate": 0.1}, **offload,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    trainer.zo.close()
    save_model(trainer.model, str(folder / "final.safetensors"))


def kill_at_random(folder: Path, tier: str | None, seed: int) -> None:
    """`train`, killed again and again, most often at the steps in which the run goes back."""
    killed(lambda: train(folder, tier), folder / "out" / LOG, KILLS, 5, random.Random(seed), soon=0.2)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("tier", [None, "disk"])
def test_a_run_that_goes_back_and_is_killed_again_and_again_is_the_uninterrupted_one(
    tier: str | None, tmp_path: Path
) -> None:
    apart(__file__, f"train(folder, {tier!r})", tmp_path / "whole")
    apart(__file__, f"kill_at_random(folder, {tier!r}, seed=0)", tmp_path / "killed")
    whole, other = (load_file(tmp_path / name / "final.safetensors") for name in ("whole", "killed"))
    assert [name for name in whole if not torch.equal(whole[name], other[name])] == []
    logs = [SeedLog.read(tmp_path / name / "out" / LOG).steps for name in ("whole", "killed")]
    steps = [[(entry.probes, entry.lrs, entry.rollback) for entry in log] for log in logs]
    assert steps[0] == steps[1]
    assert sum(rollback is not None for _, _, rollback in steps[0]) >= 1
