"""Law: however often a training process is killed with SIGKILL, nothing is lost and nothing is different."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from killing import apart, killed
from safetensors.torch import load_file

from zo_core import SeedLog

ROOT = Path(__file__).parents[2]
KILLS, STEPS = 24, 150


def train(folder: Path, tier: str | None) -> None:
    """What the process does: trains, or goes on with what is there, and writes the final weights."""
    from hf_helpers import arguments, texts
    from models import tiny
    from safetensors.torch import save_model

    from hf_zo import ZOTrainer, ZOTrainingArguments

    offload = {"zo_offload": tier, "zo_offload_dir": str(folder / "blocks")} if tier else {}
    args = arguments(
        folder, ZOTrainingArguments, max_steps=STEPS, save_strategy="steps", save_steps=7, save_total_limit=2,
        gradient_accumulation_steps=2, per_device_train_batch_size=2, learning_rate=1e-3, lr_scheduler_type="cosine",
        weight_decay=0.1, zo_rule="momentum", logging_strategy="no", zo_dropout=True, **offload,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tiny("bert", dtype=torch.bfloat16)
    trainer = ZOTrainer(model=model, args=args, train_dataset=texts())
    trainer.train(resume_from_checkpoint=(folder / "out" / "seedlog.zo").exists() or None)
    if trainer.zo.streaming is not None:
        trainer.zo.close()
    save_model(model, str(folder / "final.safetensors"))


def kill_at_random(folder: Path, tier: str | None, seed: int) -> None:
    """`train`, killed again and again."""
    killed(lambda: train(folder, tier), folder / "out" / "seedlog.zo", KILLS, 7, random.Random(seed), soon=0.3)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("tier", [None, "disk"])
def test_a_run_killed_again_and_again_is_the_uninterrupted_one(tier: str | None, tmp_path: Path) -> None:
    apart(__file__, f"train(folder, {tier!r})", tmp_path / "whole", preloaded="hf_helpers, hf_zo")
    apart(__file__, f"kill_at_random(folder, {tier!r}, seed=0)", tmp_path / "killed", preloaded="hf_helpers, hf_zo")
    whole, killed = (load_file(tmp_path / name / "final.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert [name for name in whole if not torch.equal(whole[name], killed[name])] == []
    one, other = (SeedLog.read(tmp_path / name / "out" / "seedlog.zo") for name in ("whole", "killed"))
    assert [entry.probes for entry in other.steps] == [entry.probes for entry in one.steps]
    assert len(other.steps) == STEPS
