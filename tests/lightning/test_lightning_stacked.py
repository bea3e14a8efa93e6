"""Law: one forward for all probes shows a module's trainer what separate ones do."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning_helpers import QUIET, Wrapped, loader, sgd, trainer
from models import tiny
from torch import Tensor

from lightning_zo import ZOStrategy
from zo_core import LowRank, ZOConfig

pytestmark = QUIET


class Shown(Wrapped):
    """Logs and returns what depends on the weights, and what does not."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        output = self.model(**batch)
        self.log("train_loss", output.loss)
        self.log("rows", float(len(batch["labels"])))
        return {"loss": output.loss, "logits": output.logits, "index": batch_idx}


class Looking(L.Callback):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, *args: Any) -> None:
        self.seen.append((outputs, {name: float(value) for name, value in trainer.callback_metrics.items()}))


def fit(path: Path, stack: bool, cls: type[Wrapped] = Shown, **settings: Any) -> tuple[Any, list[Any], Any]:
    module, looking = cls(model=tiny("llama", dtype=torch.float64), optimizer=sgd(1e-4)), Looking()
    strategy = ZOStrategy(ZOConfig(noise=LowRank(refresh=3), num_probes=2, eps=1e-2, stack_probes=stack))
    run = trainer(path, strategy, callbacks=[looking], **settings)
    run.fit(module, loader())
    return strategy.zo, looking.seen, module


@pytest.mark.parametrize("accumulate", [1, 2])
def test_modules_show_what_they_do_with_separate_probes(accumulate: int, tmp_path: Path) -> None:
    settings = {"accumulate_grad_batches": accumulate}
    (zo, seen, _), (_, expected, _) = (fit(tmp_path / str(stack), stack, **settings) for stack in (True, False))
    assert zo.oracle.stacking
    assert zo.oracle._compared
    assert len(seen) == 6
    for (outputs, metrics), (other, wanted) in zip(seen, expected, strict=True):
        assert metrics == pytest.approx(wanted, rel=1e-6)
        assert outputs["loss"].item() == pytest.approx(other["loss"].item(), rel=1e-6)
        assert torch.allclose(outputs["logits"], other["logits"], rtol=0, atol=1e-6)
        assert outputs["index"] == other["index"]


def test_what_has_no_stacked_form_trains_as_ever(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Item(Shown):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss: Tensor = self.model(**batch).loss
            self.log("train_loss", loss.item())
            return loss

    with caplog.at_level(logging.WARNING, "zo_core"):
        (zo, seen, a), (_, expected, b) = (fit(tmp_path / str(stack), stack, Item) for stack in (True, False))
    assert not zo.oracle.stacking
    assert "stack_probes" in caplog.text
    assert [metrics for _, metrics in seen] == [metrics for _, metrics in expected]
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
