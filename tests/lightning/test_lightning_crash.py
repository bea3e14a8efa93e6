"""Law: a Lightning process that is killed with SIGKILL and started again loses nothing, and nothing is different."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from killing import apart, killed
from safetensors.torch import load_file

from zo_core import SeedLog

ROOT = Path(__file__).parents[2]
KILLS, EPOCHS, STEPS = 6, 8, 48


def train(folder: Path) -> None:
    """What the process does: trains, or goes on with what is there, and writes the final weights."""
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning_helpers import Resumable, Wrapped, sgd, trainer
    from safetensors.torch import save_model

    def scheduled(module: torch.nn.Module) -> object:
        optimizer = sgd(momentum=0.9, weight_decay=0.1)(module)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    torch.manual_seed(0)
    module = Wrapped("llama", optimizer=scheduled)
    saving = ModelCheckpoint(folder, save_last=True, save_top_k=1, every_n_train_steps=5)
    made = trainer(
        folder, precision="bf16-true", max_epochs=EPOCHS, accumulate_grad_batches=2,
        enable_checkpointing=True, callbacks=[saving],
    )  # fmt: skip
    made.fit(module, Resumable("llama", 12), ckpt_path="last")
    save_model(module, str(folder / "final.safetensors"))


def kill_at_random(folder: Path, seed: int) -> None:
    """`train`, killed again and again."""
    killed(lambda: train(folder), folder / "seedlog.zo", KILLS, 9, random.Random(seed), soon=0.0)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_killed_again_and_again_is_the_uninterrupted_one(tmp_path: Path) -> None:
    apart(__file__, "train(folder)", tmp_path / "whole", preloaded="lightning_helpers")
    apart(__file__, "kill_at_random(folder, seed=0)", tmp_path / "killed", preloaded="lightning_helpers")
    whole, killed = (load_file(tmp_path / name / "final.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert [name for name in whole if not torch.equal(whole[name], killed[name])] == []
    one, other = (SeedLog.read(tmp_path / name / "seedlog.zo") for name in ("whole", "killed"))
    assert [entry.probes for entry in other.steps] == [entry.probes for entry in one.steps]
    assert len(other.steps) == STEPS
    assert not (tmp_path / "killed" / "seedlog-1.zo").exists()
