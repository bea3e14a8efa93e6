"""Law: a run that is stopped and continued from a checkpoint is the uninterrupted one, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import differing, weights
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_helpers import QUIET, TIERS, Resumable, Wrapped, loader, sgd, trainer
from torch import nn

from zo_core import ZOOptimizer

pytestmark = QUIET


def scheduled(make: Any) -> Any:
    def configure(module: nn.Module) -> Any:
        optimizer = make(module)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return configure


PLAIN = scheduled(sgd(momentum=0.9, weight_decay=0.1))
OWN = scheduled(lambda module: ZOOptimizer(module.parameters(), lr=1e-3))
RUNS: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "sgd": (PLAIN, {}, "32-true"),
    "sgd, bfloat16": (PLAIN, {}, "bf16-true"),
    "ZOOptimizer": (OWN, {"rule": "momentum"}, "32-true"),
    "sparse": (PLAIN, {"noise": "sparse"}, "32-true"),
    "sparse blocks": (OWN, {"rule": "momentum", "noise": {"name": "sampled", "of": "sparse"}}, "bf16-true"),
    "sgd, low rank": (PLAIN, {"noise": {"name": "low_rank", "refresh": 3}}, "32-true"),
    "low rank": (OWN, {"rule": "momentum", "noise": {"name": "low_rank", "refresh": 3}}, "bf16-true"),
}


def saving(path: Path, every: int) -> ModelCheckpoint:
    return ModelCheckpoint(path, save_last=True, save_top_k=-1, every_n_train_steps=every)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(
    ("make", "settings", "precision"),
    [
        pytest.param(*run, id=name, marks=[] if name in ("sgd, bfloat16", "sgd, low rank") else pytest.mark.slow)
        for name, run in RUNS.items()
    ],
)
def test_in_mid_epoch_with_schedule_and_accumulation(
    tmp_path: Path, make: Any, settings: dict[str, Any], tier: str | None, precision: Any
) -> None:
    def run(folder: Path, steps: int, module: Wrapped, ckpt: str | None = None) -> Any:
        run = trainer(
            folder, {"offload": tier, **settings}, max_steps=steps, max_epochs=2, accumulate_grad_batches=2,
            enable_checkpointing=True, callbacks=[saving(folder, 4)], precision=precision,
        )  # fmt: skip
        run.fit(module, Resumable(count=6), ckpt_path=ckpt)
        return run

    whole, stopped, resumed = (Wrapped(optimizer=make) for _ in range(3))
    run(tmp_path / "whole", 6, whole)
    run(tmp_path / "stopped", 4, stopped)
    assert differing(weights(whole), weights(stopped))
    final = run(tmp_path / "stopped", 6, resumed, "last")
    assert final.global_step == final.strategy.zo.step_count == 6
    assert not differing(weights(whole), weights(resumed))


@pytest.mark.parametrize("tier", TIERS)
def test_between_epochs_with_any_loader(tmp_path: Path, tier: str | None) -> None:
    def run(epochs: int, module: Wrapped, ckpt: str | None = None) -> None:
        callback = ModelCheckpoint(tmp_path, save_last=True)
        run = trainer(tmp_path, {"offload": tier}, max_epochs=epochs, enable_checkpointing=True, callbacks=[callback])
        run.fit(module, loader(), loader(count=1), ckpt_path=ckpt)

    whole, stopped, resumed = (Wrapped(optimizer=sgd(momentum=0.9)) for _ in range(3))
    run(2, whole)
    (tmp_path / "last.ckpt").unlink()
    run(1, stopped)
    run(2, resumed, "last")
    assert not differing(weights(whole), weights(resumed))


def shape(value: Any) -> Any:
    """The keys of nested dictionaries and lists."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    return [shape(inner) for inner in value] if isinstance(value, list) else None


@pytest.mark.parametrize("tier", TIERS)
def test_a_checkpoint_looks_like_any_other_and_carries_the_weights(tmp_path: Path, tier: str | None) -> None:
    make = scheduled(sgd(momentum=0.9))
    checkpoints = []
    for name, strategy in (("plain", "auto"), ("zo", {"offload": tier})):
        run = trainer(tmp_path, strategy, max_steps=2)
        module = Wrapped(optimizer=make)
        path = tmp_path / f"{name}.ckpt"
        module.on_train_end = lambda run=run, path=path: run.save_checkpoint(path)
        run.fit(module, loader())
        checkpoints.append(torch.load(path, weights_only=True))
        loaded = Wrapped.load_from_checkpoint(path)
        assert not differing(weights(loaded), weights(module))
    (state,) = checkpoints[1]["optimizer_states"]
    assert state.pop("zo")["settings"]["rule"] == "momentum"  # our mark, which SGD ignores
    assert shape(checkpoints[0]) == shape(checkpoints[1])
    groups = [checkpoint["optimizer_states"][0]["param_groups"] for checkpoint in checkpoints]
    assert groups[0] == groups[1]
    onward = trainer(tmp_path, "auto", max_epochs=2)  # backpropagation takes over
    onward.fit(Wrapped(optimizer=make), Resumable(), ckpt_path=tmp_path / "zo.ckpt")
    assert onward.global_step > 2


def test_a_run_with_backpropagation_is_continued(tmp_path: Path) -> None:
    first = trainer(tmp_path, "auto", max_steps=2)
    before = Wrapped(optimizer=sgd(1e-3, momentum=0.9))
    before.on_train_end = lambda: first.save_checkpoint(tmp_path / "x.ckpt")
    first.fit(before, loader())
    momentum = first.optimizers[0].state[before.model.lm_head.weight]["momentum_buffer"]
    second = trainer(tmp_path, "zo", max_epochs=2)
    module = Wrapped(optimizer=sgd(0.0, momentum=0.9))
    seen = []
    module.on_train_start = lambda: seen.append(
        second.strategy.zo.optimizer.state[module.model.lm_head.weight]["momentum"]
    )
    second.fit(module, Resumable(), ckpt_path=tmp_path / "x.ckpt")
    assert second.global_step > 2
    assert not torch.equal(momentum, seen[0])  # it went on
    assert differing(weights(before), weights(module))


@pytest.mark.parametrize("tier", TIERS)
def test_a_second_fit_continues_the_directions(tmp_path: Path, tier: str | None) -> None:
    once, twice = Wrapped(), Wrapped()
    trainer(tmp_path, {"offload": tier}, max_epochs=2).fit(once, loader())
    again = trainer(tmp_path, {"offload": tier}, max_epochs=1)
    again.fit(twice, loader())
    again.fit_loop.max_epochs = 2
    again.fit(twice, loader())
    assert not differing(weights(once), weights(twice))
