"""Directions in which only weights of small magnitude move (Sparse-MeZO, arXiv 2402.15751).

Each tensor has a threshold, the ``quantile`` of its magnitudes at the start of training. A step moves the
weights that are at or below it *as the step begins*: probes and update of a step all read the weights before
anything is added to them, so the mask is computed from them on the fly, and is never stored.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import NOISES, ElementNoise, Noise
from .changes import flat, flush
from .direction import PLAIN, Direction, Passes, Terms
from .wrapping import Wrapping, check_part

#: Elements per chunk in the search for a threshold, and bits that one pass over the elements determines.
CHUNK, DIGIT = 1 << 20, 16

INTEGERS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


@NOISES.register
@dataclass(frozen=True)
class Sparse(Wrapping):
    """``of``, masked to the weights of small magnitude; the others are bit-identical after every step.

    The threshold of a tensor is the magnitude of its ``round(quantile * d)``-th smallest element when the tensor
    is first measured or moved, which is before it has ever been written. It is fixed from then on and kept in
    checkpoints. Each step recomputes the mask ``|w| <= threshold`` from the weights at its start. Weights that the
    mask leaves out are neither perturbed nor updated, and neither weight decay nor momentum moves them.

    If no magnitude is above the threshold, the mask cannot distinguish elements (zero biases, norms that are all
    ones, LoRA's B); such a tensor moves as a whole for the whole run.

    With m moving elements the two-sided estimator has the second moment
    ``(m + n + kurtosis - 2) / n * |grad on them|^2``. `values` has no access to the weights, and returns the
    direction before the mask.

    Attributes:
        quantile: the fraction of each tensor that moves, above 0 and at most 1 (1 is ``of`` itself). The paper
            masks 0.75 to 0.8 of the weights, so that 0.2 to 0.25 move.
        of: a noise with independent elements.
    """

    name: ClassVar[str] = "sparse"
    quantile: float = 0.25
    of: str | dict[str, Any] | Noise = field(default="rademacher", hash=False)

    def __post_init__(self) -> None:
        check_part("quantile", self.quantile, "the share of each tensor that moves, its smallest weights")
        self._wrap(self.of)
        if not isinstance(self.wrapped, ElementNoise):
            hint = "noise={'name': 'sampled', 'of': 'sparse'}" if self.wrapped.name == "sampled" else "of='rademacher'"
            raise ValueError(
                f"noise 'sparse' masks single elements, which of={self.of!r} does not have; write {hint} "
                "(or a noise of independent elements, such as 'gaussian')"
            )

    def direction(self, slot: str, shape: torch.Size, terms: Terms, passes: Passes = PLAIN) -> Direction:
        known = {} if passes.thresholds is None else passes.thresholds
        how = slot, terms, passes.rounding_seed, passes.backend, passes.scaling
        return SparseDirection(self.elements, *how, quantile=self.quantile, thresholds=known)

    @property
    def elements(self) -> ElementNoise:
        """The noise that is masked."""
        assert isinstance(self.wrapped, ElementNoise)
        return self.wrapped


@dataclass(frozen=True)
class SparseDirection(Direction):
    """A direction from which the elements of large weights are left out.

    Attributes:
        quantile: the fraction that moves.
        thresholds: by slot; that of this slot is added when it is first needed.
    """

    quantile: float = 1.0
    thresholds: MutableMapping[str, float] = field(default_factory=dict)

    def limit(self, theta: Tensor) -> float:
        if self.slot not in self.thresholds:
            flush()
            self.thresholds[self.slot] = threshold(flat(theta), self.quantile)
        return self.thresholds[self.slot]

    def gradient(self, theta: Tensor) -> Tensor:
        values, moving = super().gradient(theta), self.mask(theta)
        return values if moving is None else values.masked_fill_(~moving(theta), 0.0)


def threshold(weights: Tensor, quantile: float) -> float:
    """The magnitude up to which elements move; infinite if that is all of them.

    It is found digit by digit in the bits of the magnitudes, whose order is that of the numbers: exact, in
    little memory, and the same on every device.

    Args:
        weights: flat.
        quantile: the fraction that moves.
    """
    integer = INTEGERS.get(weights.dtype, torch.int64)
    width = 8 * weights.element_size()
    size = 1 << DIGIT
    wanted, below, found = max(1, round(quantile * weights.numel())), 0, 0
    for shift in range(width - DIGIT, -1, -DIGIT):
        counts = torch.zeros(size, dtype=torch.int64, device=weights.device)
        for chunk in weights.split(CHUNK):
            bits = chunk.abs().view(integer).to(torch.int64)
            if shift < width - DIGIT:
                bits = bits[bits >> (shift + DIGIT) == found]
            counts += torch.bincount(bits >> shift & (size - 1), minlength=size)
        upto = counts.cumsum(0) + below
        digit = int((upto < wanted).sum())
        if digit == size:
            return math.inf  # a tensor without elements
        below, found = int(upto[digit] - counts[digit]), found << DIGIT | digit
        reached = int(upto[digit])
    if reached == weights.numel():
        return math.inf
    return float(torch.tensor(found, dtype=torch.int64).to(integer).view(weights.dtype))
