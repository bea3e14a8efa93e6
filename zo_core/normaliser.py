"""Scalar normalisers of the step, with which a learning rate carries over between models, tasks and losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from .noise.direction import float32
from .records import Point, Probe

#: Names of the normalisers, for `ZOConfig.normalise`.
GRADIENT, CURVATURE = "gradient", "curvature"


@dataclass
class Normaliser:
    """Divides the coefficients of a step by the root of a running mean of squares.

    It is a function of the losses of all steps so far; skipped steps do not count.

    Attributes:
        mean_square: the running mean.
        count: how many steps have entered it.
    """

    name: ClassVar[str]
    mean_square: float = 0.0
    count: int = 0

    @property
    def scale(self) -> float:
        """What coefficients are divided by; 1 before the first step."""
        return math.sqrt(self.mean_square) if self.count else 1.0

    def decaying(self, mean_square: float) -> float:
        """What weight decay is multiplied by in a step after which the running mean has this value."""
        return 1.0

    def extra(self, step: int, seeds: Sequence[int], eps: float) -> tuple[Point, ...]:
        """The points that a step measures for the normaliser, after those of the estimator."""
        return ()

    def counts(self, step: int) -> bool:
        """Whether a step enters the running mean."""
        return True

    def see(self, step: int, probes: tuple[Probe, ...], losses: Sequence[float], eps: float) -> None:
        """Lets a step enter the running mean, if it counts.

        Args:
            step: its index.
            probes: with the mean over the n directions in their coefficients, so that ``n * coefficient`` is the
                projected gradient of a direction.
            losses: those of the estimator's points and then those of `extra`.
            eps: distance of the probes.
        """
        raise NotImplementedError

    def apply(self, probes: tuple[Probe, ...]) -> tuple[Probe, ...]:
        """The same directions with normalised float32 coefficients; unchanged if every step so far measured 0."""
        scale = self.scale
        if scale == 0.0:
            return probes
        return tuple(Probe(probe.seed, float32(probe.coefficient / scale)) for probe in probes)

    def repeat(self, step: int, mean_square: float) -> None:
        """Counts a step of a log, which has the running mean after it."""
        self.count += self.counts(step)
        self.mean_square = mean_square

    def _enter(self, value: float, gain: float) -> None:
        self.mean_square += (value - self.mean_square) * gain
        self.count += 1

    def saved(self) -> dict[str, float | str]:
        """The state as plain values, for checkpoints and logs."""
        return {"name": self.name, "mean_square": self.mean_square, "count": self.count}

    def load(self, state: dict[str, float | str]) -> None:
        """Restores what `saved` returned."""
        self.mean_square, self.count = float(state["mean_square"]), int(state["count"])


@dataclass
class Gradient(Normaliser):
    """The running mean of squared projected gradients g (MEAZO, arXiv 2605.03869).

    ``v <- beta v + (1 - beta) mean_i(g_i^2)``, with the bias of the first steps removed as in Adam; the estimate
    becomes ``G / sqrt(v)``. The learning rate is then a length: with one direction, a typical step moves an element
    by ``lr`` (its root mean square), and no step by more than ``lr / sqrt(1 - beta)``.
    """

    name: ClassVar[str] = GRADIENT
    BETA: ClassVar[float] = 0.99

    def see(self, step: int, probes: tuple[Probe, ...], losses: Sequence[float], eps: float) -> None:
        self._enter(_mean_square(probes), (1.0 - self.BETA) / (1.0 - self.BETA ** (self.count + 1)))


@dataclass
class Curvature(Normaliser):
    """The running mean of squared curvatures ``c = (L(theta + eps z) + L(theta - eps z) - 2 L(theta)) / eps^2``.

    c estimates ``z'Hz``. A step of ``lr g / c`` along z is ``lr`` of Newton's step along it, so the learning rate has
    no unit: the scale of the loss and that of the weights cancel. Theory for one direction per step on a quadratic
    has the best rate at about ``1 / tr(H)``, and ``E[c] = tr(H)``; noise of the batches and negative curvature are why
    the root mean square is taken, which is never smaller than the mean.

    The loss at theta is one forward more, and with an estimator that does not measure both sides of its directions,
    the losses on both sides along the first one are two more. The first `EVERY_STEP` steps measure it, then one in
    `INTERVAL`, so that a curvature that grows during training is followed. One sample may be close to 0 by chance, so
    the mean begins with a pseudo-sample that makes a first step of rate 1 as long as ``1 / PRIOR``, over all weights
    together; after 16 samples it has a weight of 1/153. Steps before the first slope or curvature do not count: the
    mean begins anew, with the pseudo-sample.

    The rate that multiplies the gradient is ``lr / sqrt(v)``, so weight decay is divided by the same root, as in SGD
    with that rate; but it is never more than ``lr * weight_decay``, since nearly flat losses have a root near 0.

    Attributes:
        size: number of elements that move.
        two_sided: whether the estimator measures both sides of each direction, one after the other.
    """

    name: ClassVar[str] = CURVATURE
    EVERY_STEP: ClassVar[int] = 32
    INTERVAL: ClassVar[int] = 8
    PRIOR: ClassVar[float] = 2.5
    LEAST_GAIN: ClassVar[float] = 1 / 32
    size: float = 1.0
    two_sided: bool = True

    def decaying(self, mean_square: float) -> float:
        return 1.0 / max(1.0, math.sqrt(mean_square))

    def counts(self, step: int) -> bool:
        return self.count < self.EVERY_STEP or step % self.INTERVAL == 0

    def extra(self, step: int, seeds: Sequence[int], eps: float) -> tuple[Point, ...]:
        if not self.counts(step):
            return ()
        return tuple(Point(seeds[0], scale) for scale in ((0.0,) if self.two_sided else (eps, -eps, 0.0)))

    def see(self, step: int, probes: tuple[Probe, ...], losses: Sequence[float], eps: float) -> None:
        if not self.counts(step):
            return
        if not self.mean_square:
            self.count, self.mean_square = 0, self.PRIOR**2 * self.size * _mean_square(probes)
        *perturbed, centre = losses if self.two_sided else losses[-3:]
        pairs = zip(perturbed[::2], perturbed[1::2], strict=True)
        squares = [((plus + minus - 2.0 * centre) / (eps * eps)) ** 2 for plus, minus in pairs]
        self._enter(math.fsum(squares) / len(squares), max(2.0 / (self.count + 3), self.LEAST_GAIN))

    def repeat(self, step: int, mean_square: float) -> None:
        if not self.mean_square:
            self.count = 0
        super().repeat(step, mean_square)


def normaliser_of(name: str | None, size: float, *, two_sided: bool = True) -> Normaliser | None:
    """The normaliser of this name for ``size`` elements and an estimator of that kind; None for none."""
    if name is None:
        return None
    return {GRADIENT: Gradient(), CURVATURE: Curvature(size=size, two_sided=two_sided)}[name]


def _mean_square(probes: Sequence[Probe]) -> float:
    return math.fsum((len(probes) * probe.coefficient) ** 2 for probe in probes) / len(probes)
