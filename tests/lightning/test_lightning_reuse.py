"""Law: the strategy with ``reuse`` computes layers that rest once, resident and streamed, with every number as ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
from hf_helpers import differing, weights
from lightning_helpers import QUIET, Wrapped, loader, sgd, trainer
from models import tiny
from reuse_helpers import skips

pytestmark = QUIET


class Sees(L.Callback):
    """Keeps the losses that Lightning gets."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))


def trained(folder: Path, offload: str | None, reuse: bool, accumulate: int) -> tuple[list[float], Any]:
    module, seen = Wrapped(model=tiny("llama", tied=False, layers=3), optimizer=sgd(1e-2)), Sees()
    module.model.requires_grad_(False)
    list(module.model.model.layers)[-1].requires_grad_(True)
    module.model.config.use_cache = False
    settings: dict[str, Any] = {"reuse": reuse, "eps": 0.1, "noise": "rademacher", "num_probes": 2, "offload": offload}
    run = trainer(folder, settings, callbacks=[seen], max_steps=5, accumulate_grad_batches=accumulate)
    run.fit(module, loader())
    return seen.losses, weights(module.model)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_losses_and_weights_are_those_without_reuse(tmp_path: Path, accumulate: int) -> None:
    losses, resident = trained(tmp_path, None, False, accumulate)
    for offload in (None, "cpu", "disk"):
        with skips() as skipped:
            found, other = trained(tmp_path, offload, True, accumulate)
        assert len(skipped) == 2
        assert found == losses
        assert not differing(other, resident)
