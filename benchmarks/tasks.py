"""Small tasks for experiments with learning rates: models trained by backpropagation, and data that has shifted since.

All data comes with Python and scikit-learn, so nothing is downloaded. The trained models are kept in a folder, by
default below the system's temporary folder; delete it to train them again.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .learning import TinyTransformer, batch

Batch = tuple[Tensor, ...]
Data = Callable[[int], Batch]
Loss = Callable[[nn.Module, Batch], Tensor]

CACHE = Path(tempfile.gettempdir()) / "zo-benchmark-models"


@dataclass(frozen=True)
class Task:
    """A model trained on one task, and batches of a shifted task.

    Attributes:
        model: copied for every run.
        data: the batch of a step; negative numbers are held out.
        loss: the loss of a model on a batch.
        kind: what moves: "full", "head", "lora", "prefix" or "scales".
        eps: distance of the probes for spsa; fzoo uses a tenth.
    """

    model: nn.Module
    data: Data
    loss: Loss
    kind: str = "full"
    eps: float = 1e-3


@dataclass(frozen=True)
class Maker:
    """Makes the models of tasks: those trained before are read from ``folder``, others are trained on ``device``."""

    folder: Path = field(default=CACHE)
    device: torch.device = field(default=torch.device("cpu"))

    def trained(self, name: str, build: Callable[[], nn.Module], train: Callable[[nn.Module], object]) -> nn.Module:
        """The model of ``build`` after ``train``, in evaluation mode."""
        torch.manual_seed(0)
        model = build()
        file = self.folder / f"{name}.pt"
        if file.exists():
            model.load_state_dict(torch.load(file, weights_only=True))
        else:
            train(model.to(self.device))
            model.cpu()
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(f".{os.getpid()}.partial")
            torch.save(model.state_dict(), partial)
            partial.replace(file)
        torch.manual_seed(0)  # what is added to the model is the same whether it was read or trained
        return model.eval()


def cross_entropy(model: nn.Module, pair: Batch) -> Tensor:
    """Cross-entropy of a model that returns logits, or of a Hugging Face model that returns an output."""
    output = model(pair[0])
    logits = getattr(output, "logits", output)
    return F.cross_entropy(logits.flatten(0, -2), pair[1].flatten())


def backprop(model: nn.Module, steps: int, data: Data, lr: float, loss: Loss = cross_entropy) -> None:
    """AdamW, with a short warmup and linear decay to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 30, 1 - step / steps))
    device = next(model.parameters()).device
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, tuple(column.to(device) for column in data(step))).backward()
        optimizer.step()
        schedule.step()
    model.eval()


def sampler(size: int, *columns: Tensor) -> Data:
    """Random rows, the same for the same step; a fifth of them is held out for negative steps."""
    count = len(columns[0])
    held = count // 5

    def data(step: int) -> Batch:
        generator = torch.Generator().manual_seed(1_000_003 + step)
        rows = torch.randint(0, held, (4 * size,), generator=generator)
        if step >= 0:
            rows = held + torch.randint(0, count - held, (size,), generator=generator)
        return tuple(column[rows] for column in columns)

    return data


def held_out(task: Task, model: nn.Module) -> float:
    """The mean loss on four large held-out batches."""
    with torch.no_grad():
        return sum(float(task.loss(model, task.data(-index))) for index in range(1, 5)) / 4


@lru_cache
def digits() -> tuple[Tensor, Tensor]:
    """1,797 handwritten digits, in a fixed random order: ``[1797, 1, 8, 8]``."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 16.0, torch.tensor(labels)[order]


def shifted_digits() -> tuple[Tensor, Tensor]:
    """The digits at half the contrast and with noise, moved by one pixel."""
    images, labels = digits()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return images.roll(1, -1) * 0.5 + 0.1 * noise, labels


def _digits_task(make: Maker, name: str, build: Callable[[], nn.Module], size: int = 64) -> Task:
    model = make.trained(name, build, lambda model: backprop(model, 400, sampler(64, *digits()), 3e-3))
    return Task(model, sampler(size, *shifted_digits()), cross_entropy)


def linear(make: Maker) -> Task:
    """Logistic regression, 650 parameters."""
    return _digits_task(make, "linear", lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))


def mlp(make: Maker) -> Task:
    """9,610 parameters."""
    return _digits_task(
        make, "mlp", lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    )


def cnn(make: Maker) -> Task:
    """With max-pooling and BatchNorm; 10,058 parameters."""
    return _digits_task(
        make,
        "cnn",
        lambda: nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 10),
        ),
    )


def vit(make: Maker) -> Task:
    """A vision transformer of 18,000 parameters on 16 patches."""

    def build() -> nn.Module:
        from transformers import ViTConfig, ViTForImageClassification

        sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
        return ViTForImageClassification(ViTConfig(**sizes))

    return _digits_task(make, "vit", build, 32)


def marker(make: Maker) -> Task:
    """The small transformer and the task of `benchmarks.learning`."""

    def data(step: int) -> Batch:
        return batch(128, 10_000 + step, shifted=False)

    model = make.trained("marker", TinyTransformer, lambda model: backprop(model, 600, data, 3e-3))
    return Task(model, lambda step: batch(64, 1_000_000 + step, shifted=True), cross_entropy)
