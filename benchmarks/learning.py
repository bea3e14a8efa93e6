"""The learning gate: a tiny transformer adapts to a shifted task with forward passes only.

The task needs attention: there is a marker somewhere in the sequence, and the answer is the class of
the token after it. After pre-training by backpropagation, the classes of a quarter of the tokens
change, which reduces the accuracy to about 0.74; zeroth-order training has 4,000 forwards to learn
the new ones. Backpropagation with the same number of forwards is shown for comparison.

    python -m benchmarks.learning          # a table, 3 seeds
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zo_core import ZeroOrder

from .report import save

TOKENS, CLASSES, LENGTH, WIDTH = 16, 4, 8, 32
FORWARDS = 4000
BATCH = 256


class TinyTransformer(nn.Module):
    """One block, 9,508 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(TOKENS + 2, WIDTH)
        self.position = nn.Embedding(LENGTH, WIDTH)
        self.block = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.token(tokens) + self.position.weight
        return self.head(self.block(hidden).mean(1))


def batch(count: int, seed: int, *, shifted: bool) -> tuple[Tensor, Tensor]:
    """Sequences ``[count, 8]`` with one marker (0) each, and their classes ``[count]``."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, TOKENS + 1, (count, LENGTH), generator=generator)
    place = torch.randint(0, LENGTH - 1, (count,), generator=generator)
    rows = torch.arange(count)
    tokens[rows, place] = 0
    asked = tokens[rows, place + 1] - 1
    classes = asked // (TOKENS // CLASSES)
    if shifted:
        classes = torch.where(asked < TOKENS // 4, (classes + 1) % CLASSES, classes)
    return tokens, classes


def accuracy(model: nn.Module) -> float:
    """On 2,000 held-out sequences of the shifted task."""
    tokens, classes = batch(2000, -1, shifted=True)
    with torch.no_grad():
        return float((model(tokens).argmax(-1) == classes).float().mean())


def pretrained(seed: int) -> TinyTransformer:
    """A model that solves the original task."""
    torch.manual_seed(seed)
    model = TinyTransformer()
    backprop(model, 600, lambda step: batch(128, 10_000 * (seed + 1) + step, shifted=False))
    return model.eval()


def backprop(model: nn.Module, steps: int, data: Callable[[int], tuple[Tensor, Tensor]], lr: float = 3e-3) -> None:
    """AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step in range(steps):
        tokens, classes = data(step)
        loss = F.cross_entropy(model(tokens), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@dataclass(frozen=True)
class Method:
    """A zeroth-order method with its settings; ``forwards`` a step."""

    name: str
    settings: dict[str, object]
    forwards: int


METHODS = (
    Method("spsa", {"estimator": "spsa", "lr": 3e-4, "eps": 1e-3}, 2),
    Method("fzoo", {"estimator": "fzoo", "lr": 3e-3, "eps": 1e-3, "num_probes": 8}, 9),
)


def shifted_data(seed: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda step: batch(BATCH, 1_000_000 * (seed + 1) + step, shifted=True)


def adapt(model: nn.Module, method: Method, seed: int, goal: float | None = None) -> tuple[float, int]:
    """Trains on the shifted task.

    Args:
        model: changed in place.
        method: the method.
        seed: seed of the data and the directions.
        goal: stop when this accuracy is reached; None uses all forwards.

    Returns:
        The final accuracy, and the forwards spent.
    """
    data = shifted_data(seed)
    zo = ZeroOrder(model, seed=seed, **method.settings)  # type: ignore[arg-type]
    steps = FORWARDS // method.forwards
    for step in range(1, steps + 1):
        tokens, classes = data(step)
        zo.step(lambda: F.cross_entropy(model(tokens), classes))  # noqa: B023
        if goal is not None and step % (steps // 8) == 0 and accuracy(model) >= goal:
            return accuracy(model), step * method.forwards
    return accuracy(model), steps * method.forwards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    args = parser.parse_args()
    rows = []
    for seed in range(args.seeds):
        model = pretrained(seed)
        row = [str(seed), f"{accuracy(model):.3f}"]
        row += [f"{adapt(copy.deepcopy(model), method, seed)[0]:.3f}" for method in METHODS]
        backprop(model, FORWARDS, shifted_data(seed), lr=1e-3)
        rows.append([*row, f"{accuracy(model):.3f}"])
    columns = ["seed", "before", *(method.name for method in METHODS), "backprop (AdamW)"]
    title = f"Held-out accuracy on the shifted task after {FORWARDS} forwards"
    save("learning", title, columns, rows, torch.device("cpu"), write=args.save)


if __name__ == "__main__":
    main()
