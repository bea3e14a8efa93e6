"""Loss against forwards on the learning gate, for each method and for backpropagation.

python -m benchmarks.loss_curves --save
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.nn.functional as F
from torch import nn

from zo_core import ZeroOrder

from .learning import FORWARDS, METHODS, batch, pretrained, shifted_data
from .report import save

POINTS = 20


def held_out(model: nn.Module) -> float:
    """Loss on 2,000 sequences of the shifted task."""
    tokens, classes = batch(2000, -1, shifted=True)
    with torch.no_grad():
        return float(F.cross_entropy(model(tokens), classes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    args = parser.parse_args()
    base, data = pretrained(args.seed), shifted_data(args.seed)
    curves: dict[str, list[float]] = {}
    for method in METHODS:
        model = copy.deepcopy(base)
        zo = ZeroOrder(model, seed=args.seed, **method.settings)  # type: ignore[arg-type]
        curves[method.name], spent, step = [held_out(model)], 0, 0
        for goal in range(FORWARDS // POINTS, FORWARDS + 1, FORWARDS // POINTS):
            while spent + method.forwards <= goal:
                step, spent = step + 1, spent + method.forwards
                tokens, classes = data(step)
                zo.step(lambda: F.cross_entropy(model(tokens), classes))  # noqa: B023
            curves[method.name].append(held_out(model))
    optimizer = torch.optim.AdamW(base.parameters(), lr=1e-3)
    curves["backprop (AdamW)"] = [held_out(base)]
    for step in range(1, FORWARDS + 1):
        tokens, classes = data(step)
        optimizer.zero_grad()
        F.cross_entropy(base(tokens), classes).backward()
        optimizer.step()
        if step % (FORWARDS // POINTS) == 0:
            curves["backprop (AdamW)"].append(held_out(base))
    forwards = [str(FORWARDS // POINTS * index) for index in range(POINTS + 1)]
    rows = [[at, *(f"{curve[index]:.4f}" for curve in curves.values())] for index, at in enumerate(forwards)]
    title = "Held-out loss on the shifted task against forwards"
    save("loss-curves", title, ["forwards", *curves], rows, torch.device("cpu"), write=args.save)


if __name__ == "__main__":
    main()
