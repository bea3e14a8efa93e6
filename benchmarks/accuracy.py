"""Accuracy as the objective of a classifier, beside its loss.

    python -m benchmarks.accuracy --save
    python -m benchmarks.accuracy --directions 8 --rows 1024 --distances 0.25 0.5 --search-seeds 100 101 --save
    python -m benchmarks.accuracy --directions 8 --rows 1024 --at 0.17 0.25 --seeds 3 4 5 6 7 8 9 10 11 --save

Logistic regression (650 weights) that has learnt scikit-learn's digits by backpropagation is trained, forward only, on
digits at half the contrast, with noise and moved by one pixel. Some see only how many of 256 or 1,024 digits are right,
and have twice the forwards of those that see the loss. All rates (and the distances of the probes, for accuracy) are
searched with seeds that the table does not use.
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

#: Directions of a step for which the searches begin at the rates below, which grow with their number.
DIRECTIONS = 15


@dataclass(frozen=True)
class Contender:
    """A way to train.

    Attributes:
        name: for the table.
        settings: of the engine.
        rate: where the search for the rate begins.
        scored: whether the values of eps are searched, too.
        share: forwards, as a multiple of those of the others.
        rows: of a batch.
    """

    name: str
    settings: dict[str, Any]
    rate: float
    scored: bool = False
    share: int = 1
    rows: int = 256


POPULATION = {"estimator": {"name": "es", "antithetic": True}}
CONTENDERS = (
    Contender("loss, spsa", {"normalise": "curvature"}, 8.0),
    Contender("loss, es", POPULATION, 0.32),
    Contender("accuracy, es", {**POPULATION, "maximize": True}, 0.64, scored=True, share=2),
    Contender("loss, es", POPULATION, 0.32, rows=1024),
    Contender("accuracy, es", {**POPULATION, "maximize": True}, 0.64, scored=True, share=2, rows=1024),
)


def right(model: nn.Module, pair: tuple[Tensor, ...]) -> float:
    """The accuracy on a batch."""
    with torch.no_grad():
        return (model(pair[0]).argmax(-1) == pair[1]).float().mean().item()


def run(task: Task, contender: Contender, lr: float, eps: float, args: argparse.Namespace, seed: int) -> float:
    """The held-out accuracy after a run whose rate falls linearly to zero; every direction takes two forwards."""
    model, steps = copy.deepcopy(task.model), contender.share * args.forwards // (2 * args.directions)
    data = sampler(contender.rows, *shifted_digits())
    zo = ZeroOrder(model, seed=seed, brake=None, lr=lr, eps=eps, num_probes=args.directions, **contender.settings)
    measure = right if contender.scored else cross_entropy
    for step in range(steps):
        pair = data(step + 1_000_000 * seed)
        zo.lr = lr * (1 - step / steps)
        zo.step(lambda pair=pair: measure(model, pair))
    return accuracy(task, model)


def searched(task: Task, contender: Contender, args: argparse.Namespace) -> tuple[float, float]:
    """The rate and eps with the best runs: rates are doubled, or halved, for as long as that is better."""
    found: dict[tuple[float, float], float] = {}

    def tried(lr: float, eps: float) -> float:
        found[lr, eps] = statistics.fmean(run(task, contender, lr, eps, args, seed) for seed in args.search_seeds)
        print(f"{contender.name}: lr {lr:g}, eps {eps:g}: {found[lr, eps]:.3f}", flush=True)
        return found[lr, eps]

    for eps in args.distances if contender.scored else [1e-3]:
        begin = lr = contender.rate * args.directions / DIRECTIONS
        tried(lr, eps)
        for factor in (2.0, 0.5):
            while tried(lr * factor, eps) > found[lr, eps]:
                lr *= factor
            if lr != begin:
                break
    return max(found, key=lambda each: found[each])


def accuracy(task: Task, model: nn.Module) -> float:
    """The accuracy on four held-out batches."""
    return statistics.fmean(right(model, task.data(-index)) for index in range(1, 5))


def row(task: Task, contender: Contender, args: argparse.Namespace) -> list[str]:
    lr, eps = args.at if args.at and contender.scored else searched(task, contender, args)
    after = [run(task, contender, lr, eps, args, seed) for seed in args.seeds]
    start, *others = (f"{value:.3f}" for value in (accuracy(task, task.model), *after, statistics.fmean(after)))
    sizes = f"{contender.rows:,}", f"{contender.share * args.forwards:,}"
    cells = [contender.name, *sizes, f"{lr:.2g}", f"{eps:g}", start, *others]
    print(cells, flush=True)
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--forwards", type=int, default=3000, help="of those that see the loss")
    parser.add_argument("--directions", type=int, default=DIRECTIONS, help="of a step, measured on both sides")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[256, 1024], help="sizes of batches, of contenders to run"
    )
    parser.add_argument(
        "--distances", type=float, nargs="+", default=[0.2, 0.5, 1.0], help="eps to search, for accuracy"
    )
    parser.add_argument("--at", type=float, nargs=2, help="rate and eps for accuracy, in place of a search")
    parser.add_argument("--search-seeds", type=int, nargs="+", default=[100])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the trained models")
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    task = Task(linear(Maker(args.cache)).model, sampler(256, *shifted_digits()), cross_entropy)
    rows = [row(task, contender, args) for contender in CONTENDERS if contender.rows in args.rows]
    by_seed = [f"seed {seed}" for seed in args.seeds]
    columns = ["objective", "rows", "forwards", "rate", "eps", "before", *by_seed, "mean"]
    title = f"Accuracy on held-out digits, trained on accuracy or on the loss, {args.directions} directions a step"
    name = "accuracy" if args.directions == DIRECTIONS else f"accuracy-{args.directions}-directions"
    name += "-at" if args.at else ""
    save(name, title, columns, rows, torch.device("cpu"), write=args.save)


if __name__ == "__main__":
    main()
