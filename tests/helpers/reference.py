"""MeZO in plain torch: a slow, obvious reference that every fast path must equal bit for bit.

It uses three things of the library: the seeds, the names of the slots, and the values of z.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zo_core import Noise, Rademacher, derive_seed
from zo_core.targets import slot_keys


@dataclass
class Step:
    loss: float
    projected_grad: float


def mezo(
    model: nn.Module,
    closure: Callable[[], Tensor],
    learning_rates: list[float],
    eps: float,
    num_probes: int = 1,
    weight_decay: float = 0.0,
    seed: int = 0,
    noise: Noise | None = None,
) -> list[Step]:
    """One step per learning rate; changes the model's weights and returns the measurements of each step."""
    noise = noise or Rademacher()
    model.eval()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    params = dict(zip(slot_keys([name for name, _ in named]), [p.data for _, p in named], strict=True))
    steps = []
    for step, lr in enumerate(learning_rates):
        losses, grads, directions = [], [], []
        for probe in (derive_seed(seed, step, i) for i in range(num_probes)):
            z = {key: noise.z(probe, key, 0, p.numel()).view(p.shape) for key, p in params.items()}
            for scale in (eps, -eps):
                saved = {key: p.clone() for key, p in params.items()}
                for key, p in params.items():
                    p.copy_(p + f32(scale) * z[key])
                with torch.no_grad():
                    losses.append(float(closure()))
                for key, p in params.items():
                    p.copy_(saved[key])
            grads.append((losses[-2] - losses[-1]) / (2 * eps))
            directions.append(z)
        for key, p in params.items():
            move = torch.zeros(p.shape)
            for grad, z in zip(grads, directions, strict=True):
                coefficient = float(f32(grad / num_probes))  # four bytes of a log hold it
                move = move + f32(-lr * coefficient) * z[key]
            p.copy_(f32(1 - lr * weight_decay) * p + move)
        steps.append(Step(math.fsum(losses) / len(losses), math.fsum(grads) / num_probes))
    return steps


def conservative(
    model: nn.Module,
    closures: list[Callable[[], Tensor]],
    learning_rates: list[float],
    eps: float,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> list[Step]:
    """As `mezo` with one direction and the sum of the losses, but each step goes to the best of three weights."""
    model.eval()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    params = dict(zip(slot_keys([name for name, _ in named]), [p.data for _, p in named], strict=True))
    steps = []
    for step, lr in enumerate(learning_rates):
        probe = derive_seed(seed, step, 0)
        z = {key: Rademacher().z(probe, key, 0, p.numel()).view(p.shape) for key, p in params.items()}

        def loss_at(scale: float, z: dict[str, Tensor] = z) -> float:
            saved = {key: p.clone() for key, p in params.items()}
            for key, p in params.items():
                p.copy_(p + f32(scale) * z[key])
            with torch.no_grad():
                losses = [closure().double() for closure in closures]
            for key, p in params.items():
                p.copy_(saved[key])
            return float(sum(losses[1:], losses[0]))

        plus, minus = loss_at(eps), loss_at(-eps)
        grad = (plus - minus) / (2 * eps)
        coefficient = float(f32(grad))
        after, here, opposite = loss_at(-lr * coefficient), loss_at(0.0), loss_at(lr * coefficient)
        best = min(after, here, opposite)
        coefficient *= 1.0 if best == after else 0.0 if best == here else -1.0
        for key, p in params.items():
            p.copy_(f32(1 - lr * weight_decay) * p + f32(-lr * coefficient) * z[key])
        steps.append(Step((plus + minus) / 2, grad))
    return steps


def evolution(losses: list[float], eps: float, shaping: str = "zscore", antithetic: bool = False) -> list[float]:
    """The coefficients of the directions by definition: the mean of shaped losses times signed directions.

    With antithetic directions the losses are those of ``+z_0, -z_0, +z_1, ...``.
    """
    n = len(losses)
    if shaping == "ranks":
        losses = [sum(a < b for a in losses) + sum(a == b for a in losses) / 2 for b in losses]
    mean = math.fsum(losses) / n
    if shaping == "center":
        others = [(math.fsum(losses) - loss) / (n - 1) for loss in losses]
        shaped = [
            (loss - mean if antithetic else loss - other) / eps for loss, other in zip(losses, others, strict=True)
        ]
    else:
        shaped = [(loss - mean) / statistics.stdev(losses) for loss in losses]
    if not antithetic:
        return shaped
    return [(plus - minus) / 2 for plus, minus in zip(shaped[::2], shaped[1::2], strict=True)]


def f32(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)
