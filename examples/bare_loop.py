"""A loop of your own, and an objective that has no gradient: accuracy on real handwriting. Offline.

    python examples/bare_loop.py

A classifier of scikit-learn's digits is trained normally, then applied to digits that are shifted by one pixel. It is
adapted with forward passes only: first by its loss, then, starting over, by its accuracy, which backpropagation
cannot use.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that a clone works before it is installed

from zo_core import ZeroOrder


def accuracy(model: nn.Module, images: Tensor, digits: Tensor) -> Tensor:
    return (model(images).argmax(-1) == digits).float().mean()


def error_rate(scores: Tensor, digits: Tensor) -> Tensor:
    return (scores.argmax(-1) != digits).float().mean()


def shifted(images: Tensor) -> Tensor:
    return images.view(-1, 8, 8).roll(1, dims=2).reshape(-1, 64)


def trained_normally(images: Tensor, digits: Tensor) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(model(images), digits).backward()
        optimizer.step()
    return model


def adapt(
    model: nn.Module, data: tuple[Tensor, Tensor], steps: int, score: Callable[[Tensor, Tensor], Tensor], lr: float
) -> None:
    """A complete zeroth-order training loop."""
    zo = ZeroOrder(model, estimator="fzoo", lr=lr, eps=1e-2, num_probes=8)
    generator = torch.Generator().manual_seed(0)
    images, digits = data
    for _ in range(steps):
        rows = torch.randint(0, len(images), (256,), generator=generator)  # the same batch for all probes of a step
        zo.step(lambda: score(model(images[rows]), digits[rows]))  # noqa: B023


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args().steps
    images, digits = (torch.tensor(part) for part in load_digits(return_X_y=True))
    images = images.float() / 16
    train, test = (images[:1400], digits[:1400]), (images[1400:], digits[1400:])
    base = trained_normally(*train)
    shifted_train, shifted_test = (shifted(train[0]), train[1]), (shifted(test[0]), test[1])
    print(f"as it was trained         {accuracy(base, *test):.3f}")
    print(f"shifted, before           {accuracy(base, *shifted_test):.3f}")
    for name, score in (("its loss", F.cross_entropy), ("its accuracy", error_rate)):
        model = copy.deepcopy(base)
        adapt(model, shifted_train, steps, score, lr=3e-2)
        print(f"shifted, by {name:14}{accuracy(model, *shifted_test):.3f}")


if __name__ == "__main__":
    main()
