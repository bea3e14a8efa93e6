"""Accuracy as the objective of a classifier, beside its loss.

    python -m benchmarks.accuracy --save

Logistic regression (650 weights) that has learnt scikit-learn's digits by backpropagation is trained, forward only, on
digits at half the contrast, with noise and moved by one pixel. Some see only how many of 256 or 1,024 digits are right,
and have twice the forwards of those that see the loss. All rates (and the distances of the probes, for accuracy) are
searched with a seed that the table does not use.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zo_core import ZeroOrder

from .report import save
from .tasks import CACHE, Maker, Task, cross_entropy, linear, sampler, shifted_digits

#: Forwards of a step of every contender.
FORWARDS = 30
SEARCH_SEED = 100


@dataclass(frozen=True)
class Contender:
    """A way to train.

    Attributes:
        name: for the table.
        settings: of the engine.
        rate: where the search for the rate begins.
        distances: values of eps to search.
        share: forwards, as a multiple of those of the others.
        rows: of a batch.
    """

    name: str
    settings: dict[str, Any]
    rate: float
    distances: tuple[float, ...] = (1e-3,)
    share: int = 1
    rows: int = 256


POPULATION = {"estimator": {"name": "es", "antithetic": True}, "num_probes": FORWARDS // 2}
CONTENDERS = (
    Contender("loss, spsa", {"num_probes": FORWARDS // 2, "normalise": "curvature"}, 8.0),
    Contender("loss, es", POPULATION, 0.32),
    Contender("accuracy, es", {**POPULATION, "maximize": True}, 0.64, (0.2, 0.5, 1.0), share=2),
    Contender("loss, es", POPULATION, 0.32, rows=1024),
    Contender("accuracy, es", {**POPULATION, "maximize": True}, 0.64, (0.2, 0.5, 1.0), share=2, rows=1024),
)


def right(model: nn.Module, pair: tuple[Tensor, ...]) -> float:
    """The accuracy on a batch."""
    with torch.no_grad():
        return (model(pair[0]).argmax(-1) == pair[1]).float().mean().item()


def run(task: Task, contender: Contender, lr: float, eps: float, forwards: int, seed: int) -> float:
    """The held-out accuracy after a run whose rate falls linearly to zero."""
    model, steps = copy.deepcopy(task.model), contender.share * forwards // FORWARDS
    data = sampler(contender.rows, *shifted_digits())
    zo = ZeroOrder(model, seed=seed, brake=None, lr=lr, eps=eps, **contender.settings)
    measure = right if contender.settings.get("maximize") else cross_entropy
    for step in range(steps):
        pair = data(step + 1_000_000 * seed)
        zo.lr = lr * (1 - step / steps)
        zo.step(lambda pair=pair: measure(model, pair))
    return accuracy(task, model)


def searched(task: Task, contender: Contender, forwards: int) -> tuple[float, float]:
    """The rate and eps with the best run: rates are doubled, or halved, for as long as that is better."""
    found: dict[tuple[float, float], float] = {}
    for eps in contender.distances:
        lr = contender.rate
        found[lr, eps] = run(task, contender, lr, eps, forwards, SEARCH_SEED)
        for factor in (2.0, 0.5):
            while True:
                after = found[lr * factor, eps] = run(task, contender, lr * factor, eps, forwards, SEARCH_SEED)
                if after <= found[lr, eps]:
                    break
                lr *= factor
            if lr != contender.rate:
                break
    print(contender.name, *(f"lr {lr:g}, eps {eps:g}: {value:.3f}" for (lr, eps), value in found.items()), sep="\n  ")
    return max(found, key=lambda each: found[each])


def accuracy(task: Task, model: nn.Module) -> float:
    """The accuracy on four held-out batches."""
    return statistics.fmean(right(model, task.data(-index)) for index in range(1, 5))


def row(task: Task, contender: Contender, forwards: int, seeds: list[int]) -> list[str]:
    lr, eps = searched(task, contender, forwards)
    after = [run(task, contender, lr, eps, forwards, seed) for seed in seeds]
    start, *others = (f"{value:.3f}" for value in (accuracy(task, task.model), *after, statistics.fmean(after)))
    sizes = f"{contender.rows:,}", f"{contender.share * forwards:,}"
    cells = [contender.name, *sizes, f"{lr:g}", f"{eps:g}", start, *others]
    print(cells, flush=True)
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--forwards", type=int, default=3000, help="of those that see the loss")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the trained models")
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    task = Task(linear(Maker(args.cache)).model, sampler(256, *shifted_digits()), cross_entropy)
    rows = [row(task, contender, args.forwards, args.seeds) for contender in CONTENDERS]
    by_seed = [f"seed {seed}" for seed in args.seeds]
    columns = ["objective", "rows", "forwards", "rate", "eps", "before", *by_seed, "mean"]
    title = "Accuracy on held-out digits, trained on accuracy or on the loss"
    save("accuracy", title, columns, rows, torch.device("cpu"), write=args.save)


if __name__ == "__main__":
    main()
