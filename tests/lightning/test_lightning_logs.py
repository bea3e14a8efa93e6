"""Law: loggers get the numbers of the run in the steps in which they get the module's, which stay as they were."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning_helpers import QUIET, Resumable, Wrapped, loader, sgd, trainer

from zo_core import StepRecord

pytestmark = QUIET

KEYS = {"projected_grad", "zo_loss_mean", "zo_loss_se", "zo_lr"}


class Keep(L.Callback):
    """Keeps the record of each step."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.strategy.zo.listeners.append(self.records.append)


def rows(run: L.Trainer) -> list[dict[str, str]]:
    """What the CSV logger wrote, without empty cells."""
    with open(Path(run.log_dir) / "metrics.csv", encoding="utf-8") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


def numbers(run: L.Trainer) -> dict[int, dict[str, float]]:
    """The numbers of the run in the log, by step."""
    found = [row for row in rows(run) if "projected_grad" in row]
    return {int(row.pop("step")): {name: float(value) for name, value in row.items()} for row in found}


@pytest.mark.parametrize("accumulated", [1, 2])
def test_loggers_get_the_numbers_of_the_steps_since_their_last_turn(tmp_path: Path, accumulated: int) -> None:
    keep = Keep()
    run = trainer(
        tmp_path, {"clip": 2.0}, logger=CSVLogger(tmp_path), callbacks=[keep], log_every_n_steps=2, max_epochs=2,
        accumulate_grad_batches=accumulated,
    )  # fmt: skip
    run.fit(Wrapped(optimizer=sgd(1e-2)), loader(count=8))
    found = numbers(run)
    assert list(found) == list(range(1, 16 // accumulated, 2))
    assert list(found) == [int(row["step"]) for row in rows(run) if "train_loss" in row]
    for step, line in found.items():
        two, seen = keep.records[step - 1 : step + 1], keep.records[: step + 1]
        assert line["projected_grad"] == pytest.approx(math.sqrt(sum(r.projected_grad**2 for r in two) / 2))
        assert line["zo_loss_mean"] == pytest.approx(sum(seen) / len(seen), rel=1e-6)
        assert line["zo_lr"] == two[-1].lr
        assert line.get("zo_clipped_directions", 0) == sum(record.clipped for record in two)
        assert KEYS <= line.keys() <= {*KEYS, "zo_clipped_directions"}
    assert 0 < sum(record.clipped for record in keep.records) < len(keep.records)


def test_what_the_module_logs_is_what_it_is_without_them(tmp_path: Path) -> None:
    """Also a value of the same name."""

    class Same(Wrapped):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("projected_grad", 7.0, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    run = trainer(tmp_path, logger=CSVLogger(tmp_path))
    run.fit(Same(), loader())
    assert run.callback_metrics.keys() == run.logged_metrics.keys() == {"train_loss", "projected_grad"}
    assert float(run.callback_metrics["projected_grad"]) == 7.0
    steps = [row for row in rows(run) if "train_loss" in row]
    assert [row.keys() for row in steps] == [{"epoch", "step", "train_loss"}] * 6


def test_without_a_logger_nothing_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = trainer(tmp_path, logger=False)
    run.strategy.log = False
    run.fit(Wrapped(), loader())
    assert run.callback_metrics.keys() == {"train_loss"}
    assert not list(tmp_path.iterdir())


def test_a_step_without_a_loss_is_counted(tmp_path: Path) -> None:
    class Skipping(Wrapped):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 1 else self.loss(batch)

    run = trainer(tmp_path, logger=CSVLogger(tmp_path))
    run.fit(Skipping(), loader(count=3))
    assert [line.get("zo_skipped_steps") for line in numbers(run).values()] == [None, 1.0, None]


@pytest.mark.parametrize("ckpt", ["last", "step=2.ckpt"])
def test_the_numbers_of_a_resumed_run_are_those_of_the_whole_one(tmp_path: Path, ckpt: str) -> None:
    def run(steps: int, path: str | None = None) -> dict[int, dict[str, float]]:
        saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, save_last=True, every_n_train_steps=2)
        settings = {"logger": CSVLogger(tmp_path), "enable_checkpointing": True, "callbacks": [saving]}
        run = trainer(tmp_path, {"clip": 0.5}, max_steps=steps, **settings)
        run.fit(Wrapped(optimizer=sgd(1e-2)), Resumable(), ckpt_path=path)
        return numbers(run)

    first = run(5)
    if ckpt == "last":
        (tmp_path / "last.ckpt").unlink()
        (tmp_path / "step=2.ckpt").rename(tmp_path / "last.ckpt")
    second = run(6, "last" if ckpt == "last" else str(tmp_path / ckpt))
    whole = {**first, **second}
    assert list(second) == [2, 3, 4, 5]
    for step in (2, 3, 4):
        for name in ("zo_loss_mean", "zo_loss_se", "zo_lr"):
            assert second[step][name] == first[step][name]
    assert whole[5]["zo_loss_mean"] != whole[4]["zo_loss_mean"]


def test_layers_that_are_unfrozen_do_not_begin_a_new_window(tmp_path: Path) -> None:
    class Unfreeze(Keep):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            pl_module.model.get_input_embeddings().requires_grad_(batch_idx >= 3)

    keep = Unfreeze()
    run = trainer(tmp_path, logger=CSVLogger(tmp_path), callbacks=[keep])
    run.fit(Wrapped(), loader())
    assert numbers(run)[5]["zo_loss_mean"] == pytest.approx(sum(keep.records) / 6, rel=1e-6)
    assert len(keep.records) == 6
