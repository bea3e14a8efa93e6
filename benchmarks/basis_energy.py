"""How much of a gradient lies along the principal directions of the layers' inputs? Backpropagation only measures it.

The directions come from other batches than the gradient. A random subspace of that rank holds ``rank / columns``.
With ``--after`` it is measured again after so many steps of a contender, along the directions of before and of then.

    python -m benchmarks.basis_energy domain classify --save
    python -m benchmarks.basis_energy verbalizer classify --after mezo 1 100 --save basis-energy-stale
"""

from __future__ import annotations

import argparse
import copy
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from hf_zo.activations import principal

from .contenders import EVERY, Trainer
from .forwards_to_target import TASKS
from .report import save
from .tasks import CACHE, Maker, Task, held_out

Directions = dict[str, Tensor]
RANKS = (1, 2, 4, 8, 16)


def directions(task: Task, batches: int = 4) -> Directions:
    """The principal directions of the inputs of each layer, times their singular values."""
    layers = {name: layer for name, layer in task.model.named_modules() if isinstance(layer, nn.Linear)}
    return principal(task.model, layers, [task.data(700_000_000 + i)[0] for i in range(batches)], 4 * max(RANKS))


def energies(task: Task, found: Directions, batches: int = 4) -> dict[str, list[float]]:
    """By layer, the shares of the energy of its gradient in the span of the first directions, for each of `RANKS`."""
    task.model.zero_grad()
    for index in range(batches):
        task.loss(task.model, task.data(index)).backward()
    shares = {}
    for name, rows in found.items():
        gradient = task.model.get_parameter(f"{name}.weight").grad
        if gradient is not None and gradient.any():
            units = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
            shares[name] = [share(gradient, units[:rank]) for rank in RANKS]
    task.model.zero_grad()
    return shares


def moved(task: Task, contender: str, power: int, steps: int) -> Task:
    """The task with a copy of its model that has learnt for so many steps."""
    trainer = Trainer(EVERY[contender], replace(task, model=copy.deepcopy(task.model)), power, 0)
    for step in range(steps):
        trainer.step(task.data(step))
    if trainer.zo is not None:
        trainer.zo.close()
    return replace(task, model=trainer.model)


def medians(shares: dict[str, list[float]]) -> list[str]:
    return [f"{statistics.median(values):.0%}" for values in zip(*shares.values(), strict=True)]


def share(gradient: Tensor, directions: Tensor) -> float:
    return float((gradient @ directions.T).square().sum() / gradient.square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="+", choices=TASKS)
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the trained models")
    parser.add_argument("--after", nargs=3, metavar=("CONTENDER", "POWER", "STEPS"), help="learn in between")
    parser.add_argument("--save", metavar="NAME", nargs="?", const="basis-energy", help="file in benchmarks/results")
    args = parser.parse_args()
    rows = []
    for name in args.tasks:
        task = TASKS[name](Maker(args.cache))
        found = directions(task)
        shares = energies(task, found)
        if not args.after:
            rows += [[name, layer, *(f"{value:.0%}" for value in values)] for layer, values in shares.items()]
        rows.append([name, f"median of {len(shares)} layers", *medians(shares)])
        if args.after:
            contender, power, steps = args.after
            then = moved(task, contender, int(power), int(steps))
            losses = f"{held_out(task, task.model):.3f} to {held_out(then, then.model):.3f}"
            said = f"after {steps} steps of {contender} (held-out loss {losses})"
            rows.append([name, f"{said}, along the same", *medians(energies(then, found))])
            rows.append([name, f"{said}, along those of then", *medians(energies(then, directions(then)))])
    title = "Share of the energy of the gradient along the first principal directions of a layer's inputs, by rank"
    save(args.save or "", title, ["task", "layer", *map(str, RANKS)], rows, torch.device("cpu"), write=bool(args.save))


if __name__ == "__main__":
    main()
