"""Does `suggest_lr` find the rate that a search would find? Seven tasks, full and LoRA, three methods.

Each model is first trained by backpropagation on one task, then fine-tuned on a shifted one with a
fixed number of forwards at every rate of a grid (factor 2). The suggestion comes from a range test
before the first step. It is good if it is within a factor of 3 of the best rate of the grid, and
the run at the suggested rate must learn.

    python -m benchmarks.suggest_lr                  # a table
    python -m benchmarks.suggest_lr --tasks mlp cnn --methods spsa
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from zo_core import LrSuggestion, ZeroOrder, ZOConfig, suggest_lr

from .report import save
from .task_list import make_task
from .tasks import CACHE, Task, held_out

FORWARDS = 1000
TASKS = ("mlp", "cnn", "marker", "bert-swapped", "bert-swapped-lora", "lm", "lm-lora")
METHODS: dict[str, dict[str, Any]] = {
    "spsa": {},
    "spsa momentum": {"rule": "momentum"},
    "fzoo": {"estimator": "fzoo"},
}


def config(task: Task, method: str) -> ZOConfig:
    return ZOConfig(eps=task.eps, **METHODS[method])


def train(task: Task, settings: ZOConfig, lr: float, forwards: int, seed: int = 1) -> float:
    """The held-out loss after a run; infinite if it diverged."""
    model = copy.deepcopy(task.model)
    zo = ZeroOrder(model, settings, lr=lr, seed=seed)
    bound = 4.0 * held_out(task, model) + 2.0
    for step in range(forwards // len(zo.estimator.points(tuple(range(zo.num_probes)), zo.eps))):
        pair = task.data(step)
        loss = zo.step(lambda: task.loss(model, pair))  # noqa: B023
        if not loss < bound:
            return math.inf
    return held_out(task, model)


def suggested(task: Task, settings: ZOConfig, forwards: int = FORWARDS) -> LrSuggestion:
    """The suggestion for a run of so many forwards, from eight batches that no run uses and with the full budget."""
    pairs = [task.data(10_000_000 + index) for index in range(8)]
    known = settings.resolve()
    steps = forwards // len(known.estimator.points(tuple(range(known.num_probes)), task.eps))
    closures = [lambda pair=pair: task.loss(task.model, pair) for pair in pairs]
    return suggest_lr(task.model, closures, settings, forwards=512, steps=steps)


def search(run: Callable[[float], float], near: float) -> dict[float, float]:
    """Runs at powers of 2, outwards from one of them until two on either side are worse than the best."""
    results: dict[float, float] = {}
    start = low = high = round(math.log2(near))
    results[2.0**start] = run(2.0**start)
    while True:
        best = round(math.log2(min(results, key=results.__getitem__)))
        if best - low < 2:
            low -= 1
            results[2.0**low] = run(2.0**low)
        elif high - best < 2:
            high += 1
            results[2.0**high] = run(2.0**high)
        else:
            return dict(sorted(results.items()))


def compare(name: str, method: str, task: Task, forwards: int) -> list[str]:
    """One row: the suggestion compared with the grid."""
    settings = config(task, method)
    found = suggested(task, settings, forwards)
    grid = search(lambda lr: train(task, settings, lr, forwards), found.lr)
    best = min(grid, key=grid.__getitem__)
    reached = train(task, settings, found.lr, forwards)
    runs = " ".join(f"{lr:.1e}:{loss:.3f}" for lr, loss in grid.items())
    numbers = [f"{found.lr:.1e}", f"{best:.1e}", f"{found.lr / best:.2f}", f"{held_out(task, task.model):.3f}"]
    return [name, method, *numbers, f"{reached:.3f}", f"{grid[best]:.3f}", str(found.forwards), runs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--forwards", type=int, default=FORWARDS)
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the trained models")
    parser.add_argument("--save", metavar="NAME", help="write to benchmarks/results under this name")
    args = parser.parse_args()
    columns = ["task", "method", "suggested", "best of grid", "ratio", "loss before", "at suggested", "at best"]
    columns += ["forwards of the test", "grid (rate:loss)"]
    title = f"Suggested learning rates beside a grid; held-out loss after {args.forwards} forwards"
    rows: list[list[str]] = []
    for name in args.tasks:
        task = make_task(name, args.cache)
        for method in args.methods:
            rows.append(compare(name, method, task, args.forwards))
            save(args.save or "suggest-lr", title, columns, rows, torch.device("cpu"), write=args.save is not None)


if __name__ == "__main__":
    main()
