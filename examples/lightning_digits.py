"""Adapt a small network to shifted data with forward passes only, under Lightning, in under a minute on one CPU core.

A convolutional network learns scikit-learn's handwritten digits by backpropagation. Then the data
changes: the same digits are rotated and have half the contrast, and the network is adapted to them with
``strategy="zo"``, which runs the same, unchanged module without a backward pass.

    python examples/lightning_digits.py
    python examples/lightning_digits.py --strategy zo_offload
    python examples/lightning_digits.py --devices 2          # two processes, which Lightning starts
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_only
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that a clone works before it is installed

import lightning_zo  # noqa: F401  (registers the strategies)


class Digits(L.LightningModule):
    """An ordinary module, without any code for zeroth-order training."""

    def __init__(self, lr: float):
        super().__init__()
        self.lr = lr
        self.layers = nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
            nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Sequential(nn.Flatten(), nn.Linear(512, 64), nn.ReLU()),
            nn.Sequential(nn.Linear(64, 10)),
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.layers(images), labels)
        self.log("train_loss", loss)
        return loss

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.layers(images).argmax(1) == labels).float().mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def digits() -> tuple[Tensor, Tensor]:
    """1,797 images of 8 by 8 pixels, in a shuffled order."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[order].unsqueeze(1) / 16
    return images, torch.tensor(data.target)[order]


def shifted(images: Tensor, degrees: float = 40.0) -> Tensor:
    """The images rotated, and grey on grey instead of black on white."""
    angle = torch.deg2rad(torch.tensor(degrees))
    turn = torch.tensor([[angle.cos(), -angle.sin(), 0.0], [angle.sin(), angle.cos(), 0.0]])
    grid = F.affine_grid(turn.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return 0.25 + 0.5 * F.grid_sample(images, grid, align_corners=False)


def loader(images: Tensor, labels: Tensor, *, train: bool) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(images, labels), batch_size=128 if train else len(images), shuffle=train)


def trainer(strategy: str, epochs: int, devices: int = 1) -> L.Trainer:
    return L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=devices,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@rank_zero_only  # the other processes run this script, too
def say(line: str) -> None:
    print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strategy", default="zo", choices=["zo", "zo_offload"])
    parser.add_argument("--epochs", type=int, default=100, help="of the adaptation")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--devices", type=int, default=1)
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*|.*LeafSpec.*")
    L.seed_everything(0, verbose=False)

    images, labels = digits()
    ours, theirs = slice(0, 1200), slice(1200, None)
    after = shifted(images)
    held_out = loader(images[theirs], labels[theirs], train=False)
    held_out_after = loader(after[theirs], labels[theirs], train=False)

    module = Digits(lr=0.05)
    first = trainer("auto", 15)
    first.fit(module, loader(images[ours], labels[ours], train=True))
    known = first.test(module, held_out, verbose=False)[0]["accuracy"]
    before = first.test(module, held_out_after, verbose=False)[0]["accuracy"]
    say(f"{sum(p.numel() for p in module.parameters()):,} parameters, trained by backpropagation")
    say(f"accuracy on held-out digits            {known:.3f}")
    say(f"accuracy once the data has shifted     {before:.3f}")

    module.lr = args.lr
    start = time.perf_counter()
    second = trainer(args.strategy, args.epochs, args.devices)
    second.fit(module, loader(after[ours], labels[ours], train=True))
    seconds = time.perf_counter() - start
    adapted = second.test(module, held_out_after, verbose=False)[0]["accuracy"]
    say(f"after {second.global_step} steps of {args.strategy!r}, {seconds:.0f} s  {adapted:.3f}")


if __name__ == "__main__":
    main()
