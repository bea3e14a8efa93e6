"""Checks a loss on a small model: compares its projected gradients with those of backpropagation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigError, LossError
from .modes import probe_modes, rng_state, set_rng_state
from .records import Point
from .running import Running
from .targets import group_of

#: The step index of a check, whose directions are far from those of any training run.
CHECK_STEP = (1 << 30) - 1
#: Largest relative difference (root mean square) that counts as agreement: what the curvature of a smooth loss and
#: rounding leave at a sensible eps.
TOLERANCE = 0.1


@dataclass(frozen=True)
class GradientCheck:
    """Directional derivatives of one loss, measured from its values and computed by backpropagation.

    Attributes:
        measured: ``(L(theta + eps z) - L(theta - eps z)) / (2 eps)`` along each direction.
        exact: ``z . grad L`` along the same directions, by autograd.
        error: root mean square of their difference over that of ``exact``; infinite if all of ``exact`` are 0 and
            ``measured`` are not.
    """

    measured: tuple[float, ...]
    exact: tuple[float, ...]
    error: float

    @property
    def agrees(self) -> bool:
        """Whether forward-only training follows the gradient of this loss."""
        return self.error <= TOLERANCE

    def __str__(self) -> str:
        rows = [f"{'measured':>12}  {'autograd':>12}"]
        rows += [f"{g:>12.5g}  {d:>12.5g}" for g, d in zip(self.measured, self.exact, strict=True)]
        verdict = (
            "they agree"
            if self.agrees
            else "they do not agree: the gradient is not that of the loss value (a detach() in the loss defines "
            "another one), or the loss moves in steps, or eps is too large or too small"
        )
        return "\n".join([*rows, f"relative difference {self.error:.2g}: {verdict}"])


def check_gradient(engine: Running, closure: Callable[[], Any], directions: int) -> GradientCheck:
    """Implements `ZeroOrder.check`."""
    if not isinstance(directions, int) or isinstance(directions, bool) or directions < 1:
        raise ConfigError([f"directions={directions!r} must be a whole number of at least 1"])
    dealt = bool(group_of(engine.model))
    if dealt or engine.streaming is not None or any(slot.scaling is not None for slot in engine.slots):
        raise ConfigError(
            [
                "check() differentiates the loss, which takes ordinary weights that are all in memory; check a small "
                "model with the same loss, without offload, quantised weights and DTensors"
            ]
        )
    seeds = [engine.noise.seed(engine.seed, CHECK_STEP, index) for index in range(directions)]
    eps, oracle = engine.eps, engine.oracle
    points = [Point(seed, side * eps) for seed in seeds for side in (1.0, -1.0)]
    random = rng_state()
    with engine.hidden():
        losses = [loss.item() for loss in oracle.losses(points, closure)]
        set_rng_state(random)
        oracle.state.rewind()
        gradients = _gradients(engine, closure)
        set_rng_state(random)
        oracle.state.rewind()
        exact = tuple(_along(engine, seed, gradients) for seed in seeds)
    eps = -eps if oracle.maximize else eps  # of minus the score
    measured = tuple((plus - minus) / (2 * eps) for plus, minus in zip(losses[::2], losses[1::2], strict=True))
    size = math.hypot(*exact)
    apart = math.hypot(*(g - d for g, d in zip(measured, exact, strict=True)))
    return GradientCheck(measured, exact, apart / size if size else math.inf if apart else 0.0)


def _gradients(engine: Running, closure: Callable[[], Any]) -> list[Tensor | None]:
    """The gradient of each slot, by backpropagation through one call of the closure."""
    oracle, tensors = engine.oracle, [slot.tensor for slot in engine.slots]
    modes = probe_modes(engine.model, dropout=oracle.dropout, keep=oracle.keep_mode)
    with torch.enable_grad():
        with modes, engine.effective():
            loss = closure()
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise LossError(
                "check() compares with autograd, and this closure returns a number that autograd knows nothing of; "
                "there is no gradient to compare with; return the loss as a tensor"
            )
        return list(torch.autograd.grad(loss, tensors, allow_unused=True))


def _along(engine: Running, seed: int, gradients: list[Tensor | None]) -> float:
    """``z . grad`` for the direction of a seed, in the units of each slot's eps."""
    parts = []
    for slot, gradient in zip(engine.slots, gradients, strict=True):
        direction = engine.direction(slot, seed)
        if gradient is not None and not direction.still:
            parts.append((direction.gradient(slot.tensor.detach()).double() * gradient.double()).sum().item())
    return math.fsum(parts)
