"""A scalar normaliser of the step: steps of a stated length, whatever the scale of the loss."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .noise.direction import float32
from .records import Probe


@dataclass
class Normaliser:
    """Divides the coefficients of a step by the root of a running mean of their squares (MEAZO, arXiv 2605.03869).

    With ``v <- beta v + (1 - beta) mean_i(c_i^2)`` and the bias of the first steps removed as in Adam, the estimate
    becomes ``G / sqrt(v)``. The learning rate is then a length: with one direction, a typical step moves an element
    by ``lr`` (its root mean square), and no step by more than ``lr / sqrt(1 - beta)``.

    It is a function of the coefficients of all steps so far. Skipped steps do not count.

    Attributes:
        beta: decay of the running mean, per step.
        total: the running mean with its bias, in squared units of a coefficient.
        weight: sum of the weights in ``total``; 1 without bias.
    """

    beta: float = 0.99
    total: float = 0.0
    weight: float = 0.0

    @property
    def scale(self) -> float:
        """What coefficients are divided by: the root of the running mean of squares; 1 before the first step."""
        return math.sqrt(self.total / self.weight) if self.weight else 1.0

    def apply(self, probes: tuple[Probe, ...]) -> tuple[Probe, ...]:
        """Counts the probes of a step, and returns them with normalised coefficients.

        Args:
            probes: with the mean over the n directions in their coefficients, so that ``n * coefficient`` is what
                one direction measured.

        Returns:
            The same directions; float32 coefficients. All are 0 if every step so far measured 0.
        """
        self.total = self.beta * self.total + (1.0 - self.beta) * _mean_square(probes)
        self.weight = self.beta * self.weight + (1.0 - self.beta)
        scale = self.scale
        if scale == 0.0:
            return probes
        return tuple(Probe(probe.seed, float32(probe.coefficient / scale)) for probe in probes)

    def repeat(self, total: float) -> None:
        """Counts a step of a log, which has the ``total`` after it."""
        self.total = total
        self.weight = self.beta * self.weight + (1.0 - self.beta)

    def saved(self) -> dict[str, float]:
        """The state as plain numbers, for checkpoints and logs."""
        return {"total": self.total, "weight": self.weight}

    def load(self, state: dict[str, float]) -> None:
        """Restores what `saved` returned."""
        self.total, self.weight = float(state["total"]), float(state["weight"])


def _mean_square(probes: Iterable[Probe]) -> float:
    found = [probe.coefficient for probe in probes]
    return math.fsum((len(found) * coefficient) ** 2 for coefficient in found) / len(found)
