"""Law: the strategies go back when the loss has risen, and a run that did so is resumed bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hf_helpers import differing
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_helpers import QUIET, Resumable, Wrapped, sgd, trainer, weights
from models import tiny

from zo_core import SeedLog, replay

pytestmark = QUIET
STEPS = 48


def fit(path: Path, steps: int = STEPS, saving: bool = False, **settings: Any) -> tuple[Any, Wrapped]:
    """A run whose rate is far too high for the tiny model; with ``saving`` it continues what is there."""
    module = Wrapped(optimizer=sgd(0.3))
    if saving:
        every = ModelCheckpoint(path, save_last=True, every_n_train_steps=7)
        settings |= {"enable_checkpointing": True, "callbacks": [every]}
    run = trainer(path, {"brake": "auto"}, max_epochs=-1, max_steps=steps, **settings)
    run.fit(module, Resumable(), ckpt_path="last" if saving and (path / "last.ckpt").exists() else None)
    return run, module


def test_a_rate_that_is_too_high_is_braked_and_the_run_ends_no_worse_than_it_began(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, module = fit(tmp_path)
    log = SeedLog.read(run.strategy.log_path)
    went_back = [entry.step for entry in log.steps if entry.rollback is not None]
    lines = [line for line in caplog.messages if "the weights go back to those before step" in line]
    assert len(lines) == len(went_back) > 1
    after = [entry.loss for entry in log.steps if entry.step - 1 in went_back]
    assert all(loss < 1.25 * log.steps[0].loss for loss in after)
    assert max(entry.loss for entry in log.steps) > 10 * log.steps[0].loss
    model = Wrapped(model=tiny("llama"))
    replay(model, log)
    assert differing(weights(module), weights(model)) == []


def test_a_run_that_went_back_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    _, whole = fit(tmp_path / "whole")
    run, _ = fit(tmp_path / "parts", 24, saving=True)
    assert any(entry.rollback for entry in SeedLog.read(run.strategy.log_path).steps)
    run, module = fit(tmp_path / "parts", saving=True)
    assert differing(weights(whole), weights(module)) == []
