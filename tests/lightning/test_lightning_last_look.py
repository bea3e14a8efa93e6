"""Law: the strategies go back from the last step of a run that ends worse than it began, and others keep their bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hf_helpers import differing
from lightning.pytorch.loggers import CSVLogger
from lightning_helpers import QUIET, sgd, trainer, weights
from torch import Tensor
from turning import FIRST, Turning, assert_went_back, rows

from zo_core import last_look

pytestmark = QUIET


class Module(L.LightningModule):
    """Logs in every step, and counts the calls, for itself and for the tests."""

    made = 0

    def __init__(self) -> None:
        super().__init__()
        self.model, self.calls = Turning(), 0

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.calls += 1
        type(self).made += 1
        loss = self.model(**batch)["loss"]
        self.log("mean", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return sgd(1e-2)(self)


def fit(path: Path, turns: bool) -> tuple[Any, Module, dict[str, Tensor]]:
    module = Module()
    run = trainer(path, {"brake": "auto"}, logger=CSVLogger(path))
    run.fit(module, torch.utils.data.DataLoader(rows(turns), batch_size=1))
    return run, module, dict(run.callback_metrics)


def test_a_run_that_ends_worse_goes_back_to_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(last_look, "PART", 1 / 3)
    run, module, _ = fit(tmp_path, turns=True)
    assert_went_back(caplog.text, Module(), module, run.strategy.log_path)


def test_a_run_that_ends_better_is_the_one_without_a_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for part in (1 / 3, 0.0):
        monkeypatch.setattr(last_look, "PART", part)
        Module.made = 0
        _, module, metrics = fit(tmp_path / str(part), turns=False)
        found.append((weights(module), metrics, module.calls, Module.made))
    assert differing(found[0][0], found[1][0]) == []
    assert found[0][1:3] == found[1][1:3]
    assert found[0][3] == found[1][3] + 2 * FIRST
