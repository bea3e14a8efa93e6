"""What is the best use of eight forwards a step? Estimators on a quadratic, where nothing else is in the way.

``L(x) = x' H x / 2`` with 300 eigenvalues from 0.01 to 1, evenly spaced in their logarithm, from ``x ~ N(0, 1)``. A
forward runs on one of four micro-batches, each of which adds ``noise' x`` to the loss, with a vector of the length
given. Each estimator gets the best of seven rates; means of 20 runs.

    python -m benchmarks.directions --save
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from .report import save

D, CONDITION, MICRO_BATCHES, RUNS = 300, 100.0, 4, 20
NOISES = (0.3, 1.0, 3.0)
EPS = 1e-3

#: Losses at points ``[runs, n, d]`` on micro-batches ``[n]`` (-1 is their mean): ``[runs, n]``.
Losses = Callable[[Tensor, Tensor], Tensor]


def signs(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (len(x), count, D), generator=generator).to(x.dtype) * 2 - 1


def two_sided(x: Tensor, z: Tensor, losses: Losses, on: Tensor) -> Tensor:
    """The mean of ``g z`` over directions ``z``, each measured on its micro-batch."""
    g = (losses(x[:, None] + EPS * z, on) - losses(x[:, None] - EPS * z, on)) / (2 * EPS)
    return (g[..., None] * z).mean(1)


def shared(x: Tensor, losses: Losses, generator: torch.Generator) -> Tensor:
    """One two-sided direction for all micro-batches: 2 forwards on each of 4."""
    return two_sided(x, signs(x, 1, generator), losses, torch.tensor([-1]))


def own(x: Tensor, losses: Losses, generator: torch.Generator) -> Tensor:
    """A two-sided direction for each micro-batch."""
    return two_sided(x, signs(x, MICRO_BATCHES, generator), losses, torch.arange(MICRO_BATCHES))


def one_micro_batch(x: Tensor, losses: Losses, generator: torch.Generator) -> Tensor:
    """Four two-sided directions on one micro-batch."""
    return two_sided(x, signs(x, 4, generator), losses, torch.zeros(4, dtype=torch.long))


def alone(x: Tensor, losses: Losses, generator: torch.Generator) -> Tensor:
    """One two-sided direction on one micro-batch."""
    return two_sided(x, signs(x, 1, generator), losses, torch.zeros(1, dtype=torch.long))


def one_sided(x: Tensor, losses: Losses, generator: torch.Generator) -> Tensor:
    """Eight one-sided directions on one micro-batch, compared with the mean of their losses."""
    z = signs(x, 8, generator)
    found = losses(x[:, None] + EPS * z, torch.zeros(8, dtype=torch.long))
    g = (found - found.mean(1, keepdim=True)) / EPS * 8 / 7
    return (g[..., None] * z).mean(1)


def one_sided_own(x: Tensor, losses: Losses, generator: torch.Generator) -> Tensor:
    """Two one-sided directions on each micro-batch, compared with each other."""
    z = signs(x, 8, generator)
    found = losses(x[:, None] + EPS * z, torch.arange(MICRO_BATCHES).repeat_interleave(2)).view(len(x), -1, 2)
    g = (found - found.mean(2, keepdim=True)).flatten(1) / EPS * 2
    return (g[..., None] * z).mean(1)


def baseline(x: Tensor, losses: Losses, generator: torch.Generator) -> Tensor:
    """Seven one-sided directions on one micro-batch, compared with the loss in the middle (FZOO without its sigma)."""
    z = signs(x, 7, generator)
    points = torch.cat([x[:, None], x[:, None] + EPS * z], 1)
    found = losses(points, torch.zeros(8, dtype=torch.long))
    return ((found[:, 1:] - found[:, :1])[..., None] / EPS * z).mean(1)


#: Estimators, how many directions they have, for the rates, and how many of their steps take eight forwards.
ESTIMATORS: dict[str, tuple[Callable[[Tensor, Losses, torch.Generator], Tensor], int, int]] = {
    "1 two-sided, shared by 4 micro-batches (MeZO)": (shared, 1, 1),
    "4 two-sided, on one micro-batch": (one_micro_batch, 4, 1),
    "4 two-sided, on a micro-batch each": (own, 4, 1),
    "4 steps: 1 two-sided, on a micro-batch each": (alone, 1, 4),
    "7 one-sided against the middle, on one micro-batch": (baseline, 7, 1),
    "8 one-sided against their mean, on one micro-batch": (one_sided, 8, 1),
    "8 one-sided in pairs, a pair on each micro-batch": (one_sided_own, 8, 1),
}


def final(name: str, rate: float, noise: float, steps: int) -> float:
    """The mean loss after this many times eight forwards."""
    estimate, count, times = ESTIMATORS[name]
    generator = torch.Generator().manual_seed(0)
    h = torch.logspace(0, -torch.log10(torch.tensor(CONDITION)).item(), D, dtype=torch.float64)
    x = torch.randn(RUNS, D, generator=generator, dtype=torch.float64)
    for _ in range(steps * times):
        shift = torch.randn(RUNS, MICRO_BATCHES, D, generator=generator, dtype=torch.float64) * noise / D**0.5
        shift = torch.cat([shift, shift.mean(1, keepdim=True)], 1)

        def losses(points: Tensor, on: Tensor, shift: Tensor = shift) -> Tensor:
            return (points.square() * h).sum(-1) / 2 + (points * shift[:, on]).sum(-1)

        x = x - rate * count / (h.sum() + count) * estimate(x, losses, generator)
    value = float((x.square() * h).sum(-1).mean() / 2)
    return value if value < 1e6 else float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in ESTIMATORS:
        losses = [min(final(name, 2.0**power, noise, args.steps) for power in range(-4, 3)) for noise in NOISES]
        rows.append([name, *(f"{loss:.2f}" for loss in losses)])
        print(rows[-1], flush=True)
    title = f"Loss of a quadratic after {args.steps} steps of eight forwards, from 32.4, by the length of the noise"
    save("directions", title, ["directions", *map(str, NOISES)], rows, torch.device("cpu"), write=args.save)


if __name__ == "__main__":
    main()
