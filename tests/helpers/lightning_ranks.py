"""Runs of the strategies on two devices: Lightning starts this script again for the second process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from lightning_zo import ZOStrategy

STEPS = 8
BACKPROP = {"backprop": ("last", "layers.2"), "backprop_lr": 1e-2}


class Interrupted(Exception):
    """An error of the user's own code."""


class Interrupt(Callback):
    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == STEPS - 2:
            raise Interrupted


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3)]
        self.first, self.layers, self.last = nn.Linear(6, 16), nn.ModuleList(layers), nn.Linear(16, 4)

    def forward(self, rows: Tensor) -> Tensor:
        hidden = self.first(rows)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        found: Tensor = self.last(hidden)
        return found

    def training_step(self, batch: Any, index: int) -> Tensor:
        rows, labels = batch
        loss = F.cross_entropy(self(rows), labels)
        self.log("loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        rows, labels = batch
        self.log("val", F.cross_entropy(self(rows), labels), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9)


class Uneven(IterableDataset[Any]):
    """Has fewer batches on rank 1, and does not know how many."""

    def __iter__(self) -> Iterator[Any]:
        rank = torch.distributed.get_rank()
        for step in range(5 - 2 * rank):
            generator = torch.Generator().manual_seed(10 * rank + step)
            rows = torch.randn(8, 6, generator=generator)
            yield rows, rows.argmax(1) % 4


def loader(*, shuffle: bool) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 6, generator=generator)
    return DataLoader(TensorDataset(rows, rows.argmax(1) % 4), batch_size=8, shuffle=shuffle)


def fit(
    folder: Path,
    strategy: Any,
    *callbacks: Callback,
    resume: str | None = None,
    data: Any = None,
    devices: int = 2,
    clip: float | None = None,
) -> dict[str, Any]:
    run = Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=devices,
        gradient_clip_val=clip,
        max_steps=STEPS,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, save_last=True, every_n_train_steps=4), *callbacks],
    )
    trained = Module()
    with suppress(Interrupted):
        run.fit(trained, loader(shuffle=True) if data is None else data, loader(shuffle=False), ckpt_path=resume)
    return {
        "state": trained.state_dict(),
        "steps": run.global_step,
        "epochs": run.current_epoch,
        "metrics": {key: float(value) for key, value in run.callback_metrics.items()},
    }


def alike(folder: Path, devices: int = 2, **settings: Any) -> dict[str, Any]:
    """A run with backprop whose batches are the same in one process and in two."""
    strategy, rows = ZOStrategy({**BACKPROP, **settings}), loader(shuffle=False).dataset
    # Without such a sampler Lightning puts one of its own in each of several processes, which shuffles.
    ordered = DistributedSampler(rows, num_replicas=1, rank=0, shuffle=False)
    data = DataLoader(rows, batch_size=8, sampler=ordered)
    return fit(folder, strategy, data=data, devices=devices, clip=0.5)


def main(folder: Path, *names: str) -> None:
    runs: dict[str, Any] = {
        "zo": lambda: fit(folder / "zo", "zo"),
        "zo_offload": lambda: fit(folder / "zo_offload", "zo_offload"),
        "interrupted": lambda: fit(folder / "resumed", "zo", Interrupt()),
        "resumed": lambda: fit(folder / "resumed", "zo", resume="last"),
        "points": lambda: fit(folder / "points", ZOStrategy({"ranks": "points"}), data=loader(shuffle=False)),
        "backprop": lambda: fit(folder / "backprop", ZOStrategy(BACKPROP)),
        "backprop interrupted": lambda: fit(folder / "backprop resumed", ZOStrategy(BACKPROP), Interrupt()),
        "backprop resumed": lambda: fit(folder / "backprop resumed", ZOStrategy(BACKPROP), resume="last"),
        "backprop points": lambda: alike(folder / "backprop points", ranks="points"),
        "uneven": lambda: fit(folder / "uneven", "zo", data=DataLoader(Uneven(), batch_size=None)),
    }
    for which in names:
        found = runs[which]()
        torch.save(found, folder / f"{which}{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
