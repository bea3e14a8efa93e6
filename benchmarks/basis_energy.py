"""How much of a gradient lies along the principal directions of the layers' inputs? Backpropagation only measures it.

The directions come from other batches than the gradient. A random subspace of that rank holds ``rank / columns``.

    python -m benchmarks.basis_energy domain classify --save
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from torch import Tensor, nn

from hf_zo.activations import principal

from .forwards_to_target import TASKS
from .report import save
from .tasks import CACHE, Maker, Task

RANKS = (1, 2, 4, 8, 16)


def energies(task: Task, batches: int = 4) -> dict[str, list[float]]:
    """By layer, the shares of the energy of its gradient in the span of the first directions, for each of `RANKS`."""
    layers = {name: layer for name, layer in task.model.named_modules() if isinstance(layer, nn.Linear)}
    found = principal(task.model, layers, [task.data(700_000_000 + i)[0] for i in range(batches)], 4 * max(RANKS))
    task.model.zero_grad()
    for index in range(batches):
        task.loss(task.model, task.data(index)).backward()
    shares = {}
    for name, rows in found.items():
        gradient = layers[name].weight.grad
        if gradient is not None and gradient.any():
            directions = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
            shares[name] = [share(gradient, directions[:rank]) for rank in RANKS]
    task.model.zero_grad()
    return shares


def share(gradient: Tensor, directions: Tensor) -> float:
    return float((gradient @ directions.T).square().sum() / gradient.square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="+", choices=TASKS)
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the trained models")
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    args = parser.parse_args()
    rows = []
    for name in args.tasks:
        task = TASKS[name](Maker(args.cache))
        shares = energies(task)
        rows += [[name, layer, *(f"{value:.0%}" for value in values)] for layer, values in shares.items()]
        medians = [statistics.median(values) for values in zip(*shares.values(), strict=True)]
        rows.append([name, f"median of {len(shares)} layers", *(f"{value:.0%}" for value in medians)])
    title = "Share of the energy of the gradient along the first principal directions of a layer's inputs, by rank"
    save("basis-energy", title, ["task", "layer", *map(str, RANKS)], rows, torch.device("cpu"), write=args.save)


if __name__ == "__main__":
    main()
