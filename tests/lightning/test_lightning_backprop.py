"""Laws: the strategy with ``backprop`` is the bare loop with it, bit for bit, and resumes from its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import differing, weights
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_helpers import QUIET, Resumable, Wrapped, batches, fitted, loader, sgd, trainer
from models import tiny
from torch import nn

from zo_core import ConfigError, ZeroOrder, ZOConfig, ZOOptimizer

pytestmark = QUIET

NAMES = ("lm_head", "model.layers.1")
SETTINGS = {"backprop": tuple(f"model.{name}" for name in NAMES), "backprop_lr": 1e-2}


def scheduled(module: nn.Module) -> Any:
    optimizer = ZOOptimizer(module.parameters(), lr=1e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def bare(optimizer: Any, accumulate: int = 1, max_norm: float | None = None) -> Any:
    model = tiny("llama")
    made = optimizer(model)
    inner, schedule = (made["optimizer"], made["lr_scheduler"]["scheduler"]) if isinstance(made, dict) else (made, None)
    zo = ZeroOrder(model, ZOConfig(backprop=NAMES, backprop_lr=1e-2), optimizer=inner)
    assert zo.backprop is not None
    zo.backprop.max_norm = max_norm
    data = batches()
    for start in range(0, len(data), accumulate):
        for batch in data[start : start + accumulate]:
            zo.measure(lambda batch=batch: model(**batch).loss / accumulate)
        zo.optimizer.step()
        if schedule is not None:
            schedule.step()
    return weights(model)


def test_it_is_the_bare_loop(tmp_path: Path) -> None:
    module = Wrapped(optimizer=scheduled)
    found = fitted(tmp_path, module, SETTINGS, data=loader(), accumulate_grad_batches=2, gradient_clip_val=0.5)
    assert not differing(found, bare(scheduled, 2, 0.5))


def test_beside_an_sgd_whose_decay_counts(tmp_path: Path) -> None:
    module = Wrapped(optimizer=sgd(1e-3, weight_decay=0.1))
    found = fitted(tmp_path, module, SETTINGS, data=loader())
    theirs = bare(lambda model: ZOOptimizer(model.parameters(), lr=1e-3, weight_decay=0.1))
    assert not differing(found, theirs)


def test_streamed_is_resident(tmp_path: Path) -> None:
    def run(offload: str | None) -> Any:
        module = Wrapped(model=tiny("llama", tied=False), optimizer=scheduled)
        settings = {**SETTINGS, "offload": offload}
        return fitted(tmp_path, module, settings, data=loader(), accumulate_grad_batches=2)

    assert not differing(run("disk"), run(None))


def test_a_resumed_run_is_the_whole_one(tmp_path: Path) -> None:
    def run(folder: Path, steps: int, module: Wrapped, ckpt: str | None = None) -> Any:
        saving = ModelCheckpoint(folder, save_last=True, save_top_k=-1, every_n_train_steps=2)
        settings = {"max_steps": steps, "enable_checkpointing": True, "callbacks": [saving]}
        running = trainer(folder, SETTINGS, **settings)
        running.fit(module, Resumable(), ckpt_path=ckpt)
        return weights(module.model)

    whole = run(tmp_path / "whole", 5, Wrapped(optimizer=scheduled))
    run(tmp_path / "half", 2, Wrapped(optimizer=scheduled))
    again = run(tmp_path / "half", 5, Wrapped(optimizer=scheduled), str(tmp_path / "half" / "last.ckpt"))
    assert not differing(again, whole)
    assert not list(tmp_path.rglob("seedlog*"))


def test_what_needs_a_scaler_or_clips_values_is_refused(tmp_path: Path) -> None:
    settings = {"precision": "16-true", "gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}
    with pytest.raises(ConfigError) as raised:
        fitted(tmp_path, Wrapped(), SETTINGS, data=loader(), **settings)
    assert len(raised.value.problems) == 2
