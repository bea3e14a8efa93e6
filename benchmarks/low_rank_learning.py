"""Low-rank against full-rank directions on the learning gate, at equal forwards.

Each noise gets its best learning rate from the same short list, by the mean held-out loss over the seeds;
see `benchmarks.learning` for the task.

    python -m benchmarks.low_rank_learning --save
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from .learning import FORWARDS, Method, accuracy, adapt, batch, pretrained
from .report import save

RATES = (3e-4, 6e-4, 1e-3)
NOISES: dict[str, object] = {
    "rademacher": "rademacher",
    "low_rank(2, refresh=50)": {"name": "low_rank", "rank": 2, "refresh": 50},
}


def heldout_loss(model: nn.Module) -> float:
    """On 2,000 held-out sequences of the shifted task."""
    tokens, classes = batch(2000, -1, shifted=True)
    with torch.no_grad():
        return float(F.cross_entropy(model(tokens), classes))


def compare(name: str, noises: dict[str, object], rates: tuple[float, ...]) -> None:
    """Trains with each noise at each rate, by the options of the command line, and reports as ``name``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=list(rates))
    parser.add_argument("--noises", nargs="+", choices=noises, default=list(noises))
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    args = parser.parse_args()
    starts = [pretrained(seed) for seed in range(args.seeds)]
    rows = [["before", "", *(f"{heldout_loss(m):.4f}" for m in starts), "", f"{mean(map(accuracy, starts)):.3f}"]]
    for noise in args.noises:
        for rate in args.rates:
            method = Method(noise, {"estimator": "spsa", "lr": rate, "eps": 1e-3, "noise": noises[noise]}, 2)
            losses, reached = [], []
            for seed, start in enumerate(starts):
                model = copy.deepcopy(start)
                reached.append(adapt(model, method, seed)[0])
                losses.append(heldout_loss(model))
            shown = [f"{loss:.4f}" for loss in losses]
            rows.append([noise, f"{rate:g}", *shown, f"{mean(losses):.4f}", f"{mean(reached):.3f}"])
            print(rows[-1], flush=True)
    columns = ["noise", "lr", *(f"loss, seed {seed}" for seed in range(args.seeds)), "mean loss", "mean accuracy"]
    title = f"Held-out loss on the shifted task after {FORWARDS} forwards, by learning rate"
    save(name, title, columns, rows, torch.device("cpu"), write=args.save)


def main() -> None:
    compare("low-rank-learning", NOISES, RATES)


def mean(values: Iterable[float]) -> float:
    kept = list(values)
    return sum(kept) / len(kept)


if __name__ == "__main__":
    main()
