"""Law: without a learning rate and without a scheduler the rate decays linearly to zero, otherwise it is untouched."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import differing, weights
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning_helpers import QUIET, Wrapped, batches, loader, trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from zo_core import ZOOptimizer

pytestmark = QUIET


def left(module: nn.Module) -> ZOOptimizer:
    return ZOOptimizer(module.parameters())


def given(module: nn.Module) -> ZOOptimizer:
    return ZOOptimizer(module.parameters(), lr=0.25)


def halved(module: nn.Module) -> Any:
    optimizer = left(module)
    return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), "interval": "step"}]


class Rates(Callback):
    """Collects the rate of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: Any, *others: Any) -> None:
        if trainer.fit_loop.batch_idx % trainer.accumulate_grad_batches == 0:
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        return iter(batches("mlp", 4))


def rates(path: Path, make: Any, data: Any = None, *others: Callback, **settings: Any) -> list[float]:
    seen = Rates()
    run = trainer(path, "zo", callbacks=[seen, *others], **settings)
    run.fit(Wrapped("mlp", make), loader("mlp", 6) if data is None else data)
    return seen.seen


@pytest.mark.parametrize(
    ("settings", "steps"),
    [({"max_epochs": 2}, 12), ({"max_steps": 4}, 4), ({"max_epochs": 2, "accumulate_grad_batches": 3}, 4)],
)
def test_the_rate_decays_over_the_whole_run(tmp_path: Path, settings: dict[str, Any], steps: int) -> None:
    assert rates(tmp_path, left, **settings) == [0.25 * (1.0 - step / steps) for step in range(steps)]


@pytest.mark.parametrize("make", [given, halved])
def test_a_rate_or_a_scheduler_of_the_user_is_untouched(tmp_path: Path, make: Any) -> None:
    expected = [0.25 if make is given else 0.25 * 0.5**step for step in range(4)]
    assert rates(tmp_path, make, max_steps=4) == expected


def test_a_run_of_unknown_length_does_not_decay(tmp_path: Path) -> None:
    endless = DataLoader(Endless(), batch_size=None)
    assert rates(tmp_path, left, endless, max_epochs=1) == [0.25] * 4


def test_one_line_says_so_and_monitors_see_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = CSVLogger(tmp_path)
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        rates(tmp_path, left, None, LearningRateMonitor("step"), max_steps=4, logger=logger)
    (line,) = [message for message in caplog.messages if "decays" in message]
    assert "the rate decays linearly to zero over 4 steps; return a scheduler" in line
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        logged = [float(row["lr-ZOOptimizer"]) for row in csv.DictReader(file) if row["lr-ZOOptimizer"]]
    assert logged == [0.25, 0.1875, 0.125, 0.0625]


def test_a_resumed_run_decays_as_the_uninterrupted_one_does(tmp_path: Path) -> None:
    def run(ckpt: Any = None) -> tuple[list[float], Any]:
        seen, module = Rates(), Wrapped("mlp", left)
        saving = ModelCheckpoint(tmp_path, filename="at-{step}", save_top_k=-1, every_n_train_steps=4)
        settings = {"max_epochs": 2, "enable_checkpointing": True, "callbacks": [seen, saving]}
        trainer(tmp_path, "zo", **settings).fit(module, loader("mlp", 4), ckpt_path=ckpt)
        return seen.seen, weights(module)

    whole, final = run()
    assert len(whole) == 8
    rest, again = run(tmp_path / "at-step=4.ckpt")
    assert rest == whole[4:]
    assert not differing(final, again)


@pytest.mark.parametrize("limit", ["max_epochs", "max_steps"])
def test_a_second_fit_decays_over_its_own_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture, limit: str) -> None:
    def longer(run: Any) -> None:
        run.fit_loop.max_epochs = 3
        if limit == "max_steps":
            run.fit_loop.epoch_loop.max_steps = 12

    def made(seen: Rates) -> Any:
        saving = ModelCheckpoint(tmp_path, filename="at-{step}", save_top_k=-1, every_n_train_steps=2)
        settings = {limit: 1 if limit == "max_epochs" else 4, "enable_checkpointing": True}
        return trainer(tmp_path, "zo", callbacks=[seen, saving], **settings)

    seen, module = Rates(), Wrapped("mlp", left)
    run = made(seen)
    run.fit(module, loader("mlp", 4))
    assert seen.seen == [0.25 * (1.0 - step / 4) for step in range(4)]
    longer(run)
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        run.fit(module, loader("mlp", 4))
    assert "decays linearly to zero over 8 steps" in caplog.text
    second = [0.25 * (1.0 - step / 8) for step in range(8)]
    assert seen.seen[4:] == second
    again, rest = Wrapped("mlp", left), Rates()
    resumed = made(rest)
    longer(resumed)
    resumed.fit(again, loader("mlp", 4), ckpt_path=tmp_path / "at-step=8.ckpt")
    assert rest.seen == second[4:]
    assert not differing(weights(module), weights(again))


def test_a_run_from_before_the_decay_goes_on_without_it(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=4)
    settings = {"max_epochs": 1, "enable_checkpointing": True, "callbacks": [saving]}
    trainer(tmp_path, "zo", **settings).fit(Wrapped("mlp", given), loader("mlp", 4))
    seen = Rates()
    run = trainer(tmp_path, "zo", max_epochs=2, enable_checkpointing=True, callbacks=[seen, saving])
    run.fit(Wrapped("mlp", left), loader("mlp", 4), ckpt_path=tmp_path / "last.ckpt")
    assert seen.seen == [0.25] * 4
    assert not run.lr_scheduler_configs
