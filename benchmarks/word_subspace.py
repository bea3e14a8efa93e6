"""One word of a quantised diffusion model, with all directions and along past moves alone (ZOODiP, arXiv 2503.14868).

The word and the model are those of `examples/diffusion.py`. Along past moves, every 16 steps begin with a basis of the
words so far: the fewest principal directions that hold 95% of their variance. The estimate is projected on it by having
directions in it alone. Each row is at the best of three rates, by the mean of the held-out losses at the end.

    python -m benchmarks.word_subspace --save
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchao.utils import TorchAOBaseTensor

from zo_core import ZeroOrder

from .report import save

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import diffusion as example

SEEDS = (0, 1, 2)
RATES = (0.25, 1.0, 4.0)
WINDOW, VARIANCE = 16, 0.95
#: After how many steps the loss is measured; the last is the length of a run.
MEASURED = (32, 80, 160, 304)


class Moved(nn.Module):
    """A word as a start and coefficients of a basis, which is that of all directions at first."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.register_buffer("start", start.clone())
        self.register_buffer("basis", torch.eye(len(start)))

    def forward(self, coefficients: Tensor) -> Tensor:
        return self.start + self.basis @ coefficients

    def move_along(self, words: Tensor, coefficients: Tensor) -> None:
        """Begins anew at the last of these words, float32 ``[words, width]``, along what they have in common."""
        _, sizes, directions = torch.linalg.svd(words - words.mean(0), full_matrices=False)
        shares = sizes.square().cumsum(0) / sizes.square().sum()
        count = int((shares < VARIANCE).sum()) + 1
        self.start.copy_(words[-1])
        self.basis.zero_()[:, :count] = directions[:count].T
        coefficients.zero_()


def ready(base: example.Denoiser) -> example.Denoiser:
    """The quantised model with a word that learns; its weights have the values of the 4-bit ones, dequantised once."""
    model = example.prepared(base, "word")
    for layer in model.model.modules():
        weight = getattr(layer, "weight", None)
        if isinstance(weight, TorchAOBaseTensor):
            layer.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
    return model


def losses(base: example.Denoiser, task: example.Task, past: bool, rate: float, seed: int) -> list[float]:
    """The held-out losses of a run, at `MEASURED`."""
    model = ready(base)
    moved = Moved(model.new.detach())
    parametrize.register_parametrization(model, "new", moved)
    coefficients = model.parametrizations.new.original
    coefficients.data.zero_()
    zo = ZeroOrder(model, target="trainable", normalise="curvature", lr=rate, seed=seed, brake=None)
    schedule = torch.optim.lr_scheduler.LinearLR(zo.optimizer, 1.0, 0.01, MEASURED[-1])
    draws = example.drawn(task.images, task.words, example.BATCH, example.PAIRS, seed=2 + seed)
    words, found = [model.new.detach()], []
    for step in range(1, MEASURED[-1] + 1):
        draw = next(draws)
        zo.step(lambda: model.loss(draw))  # noqa: B023
        schedule.step()
        words.append(model.new.detach())
        if past and step % WINDOW == 0:
            moved.move_along(torch.stack(words), coefficients.data)
        if step in MEASURED:
            found.append(task.loss(model))
    zo.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    args = parser.parse_args()
    logging.getLogger("zo_core").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    images, labels = example.digits()
    base = example.pretrained("transformer", images, labels, 600)
    nines = labels == example.NINE
    task = example.Task.of(images[nines], torch.full((int(nines.sum()),), example.NEW), torch.full((9,), example.NEW))
    rows = [["before", "", *[f"{task.loss(ready(base)):.4f}"] * len(MEASURED), ""]]
    for past in (False, True):
        runs = {rate: [losses(base, task, past, rate, seed) for seed in SEEDS] for rate in RATES}
        ends = {rate: sum(run[-1] for run in found) for rate, found in runs.items()}
        print({rate: f"{end / len(SEEDS):.4f}" for rate, end in ends.items()}, flush=True)
        rate = min(ends, key=lambda rate: ends[rate])
        means = [f"{sum(at) / len(SEEDS):.4f}" for at in zip(*runs[rate], strict=True)]
        each = ", ".join(f"{run[-1]:.4f}" for run in runs[rate])
        rows.append(["along past moves" if past else "all directions", f"{rate:g}", *means, each])
    columns = ["directions", "rate", *(f"{step} steps" for step in MEASURED), "each seed at the end"]
    save(
        "word-subspace",
        "Held-out loss of a word, mean of three seeds",
        columns,
        rows,
        torch.device("cpu"),
        write=args.save,
    )


if __name__ == "__main__":
    main()
