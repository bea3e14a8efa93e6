"""Law: scales of 4-bit layers train under Lightning as in a bare loop, and everything else works with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from int4_models import Quantised, codes, equal, scales
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_helpers import QUIET, trainer
from torch import Tensor

from zo_core import ConfigError, Int4Scales, ZeroOrder, ZOOptimizer, replay

pytestmark = QUIET

LR, EPS = 1e-2, 1e-2


def batches(count: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(6, 8, generator=generator), torch.randint(0, 5, (6,), generator=generator)) for _ in range(count)
    ]


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = Quantised()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(*batch)

    def configure_optimizers(self) -> Any:
        moving = [slot.tensor for slot in Int4Scales().slots(self)]
        return ZOOptimizer(moving, lr=LR, eps=EPS)


def fit(path: Path, epochs: int, ckpt: str | None = None, **settings: Any) -> Module:
    data = torch.utils.data.DataLoader(batches(), batch_size=None)
    saving = ModelCheckpoint(path, save_last=True, every_n_epochs=1)
    module = Module()
    made = trainer(path, settings, max_epochs=epochs, enable_checkpointing=True, callbacks=[saving])
    made.fit(module, data, ckpt_path=ckpt)
    return module


@pytest.mark.parametrize("tier", [None, "cpu"])
def test_scales_under_lightning_are_those_of_a_bare_loop_and_of_the_log(tmp_path: Path, tier: str | None) -> None:
    model = Quantised()
    start = scales(model)
    zo = ZeroOrder(model, lr=LR, eps=EPS, rule="momentum")
    for batch in [*batches(), *batches()]:
        zo.step(lambda batch=batch: model(*batch))
    whole = fit(tmp_path / "whole", 2, offload=tier, rule="momentum")
    assert equal(scales(whole.model), scales(model))
    assert equal(codes(whole.model), codes(model))
    assert not equal(scales(model), start)
    fit(tmp_path / "parts", 1, offload=tier, rule="momentum")
    resumed = fit(tmp_path / "parts", 2, "last", offload=tier, rule="momentum")
    assert equal(scales(resumed.model), scales(model))
    for path in (tmp_path / "whole", tmp_path / "parts"):
        base = Quantised()
        replay(base, path / "seedlog.zo")
        assert equal(scales(base), scales(model))


def test_an_optimizer_without_the_scales_is_told_which_it_should_have(tmp_path: Path) -> None:
    class Ordinary(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=LR)

    data = torch.utils.data.DataLoader(batches(), batch_size=None)
    with pytest.raises(ConfigError, match=r"target='int4_scales' moves.*ZOOptimizer.*target='trainable'"):
        trainer(tmp_path).fit(Ordinary(), data)
    made = trainer(tmp_path, {"target": "trainable"})
    module = Ordinary()
    made.fit(module, data)
    assert not torch.equal(module.model.head.weight, Quantised().head.weight)
