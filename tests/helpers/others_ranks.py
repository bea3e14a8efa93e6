"""What Lightning and accelerate try their own distributed training on, trained with forward passes by two processes.

torchrun --nproc_per_node 2 others_ranks.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from accelerate import Accelerator
from accelerate.test_utils.training import RegressionDataset, RegressionModel
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

import lightning_zo  # noqa: F401  registers the strategies
from zo_core import SeedLogWriter, ZeroOrder


class Boring(BoringModel):
    """Lightning's, with a rate for forward passes: its own, 0.1, is for gradients."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.layer.parameters(), lr=1e-3)


def boring() -> Boring:
    torch.manual_seed(0)
    return Boring()


def lightning(folder: Path) -> dict[str, Any]:
    """Lightning's model and data, and its trainer with our strategy."""
    model, quiet = boring(), {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(default_root_dir=folder, accelerator="cpu", devices=2, strategy="zo", max_epochs=3, **quiet)
    trainer.fit(model)
    return {"state": model.state_dict(), "wrapped": type(trainer.model).__name__}


def accelerate(folder: Path) -> dict[str, Any]:
    """The line that accelerate fits with its loaders; the loop has ``zo.step`` in place of the backward pass."""
    accelerator = Accelerator(cpu=True)
    model = RegressionModel()
    model.first_batch = False  # it would print
    loader = accelerator.prepare(DataLoader(RegressionDataset(length=64, seed=0), batch_size=8, shuffle=True))
    zo = ZeroOrder(model)
    if accelerator.is_main_process:
        SeedLogWriter.attach(zo, folder / "regression.zo")
    for _ in range(60):
        for batch in zo.batches(loader):
            zo.step(lambda: (model(batch["x"]) - batch["y"]).square().mean())  # noqa: B023
    return {"state": model.state_dict()}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for name, run in {"accelerate": accelerate, "lightning": lightning}.items():
        found = run(folder / name if name == "lightning" else folder)
        torch.save(found, folder / f"{name}{torch.distributed.get_rank()}.pt")
