"""Directions that move a random subset of a model's blocks in each step.

The draw depends only on the seed of a direction and the name of a block, so probes, update, log and replay
agree without a list of blocks. There is one draw per *step*, shared by all of its directions; blocks that
are not drawn are neither copied nor written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import torch

from .base import NOISES, Noise
from .direction import PLAIN, Direction, Passes, Scaling, Terms
from .hashing import BLOCKS, MASK32, derive_seed, stream_key
from .wrapping import Wrapping, check_part

#: The seed of the other noise is in the low bits of a direction's seed, that of the draw above them.
DRAW_BITS = 128


@NOISES.register
@dataclass(frozen=True)
class Sampled(Wrapping):
    """Applies ``of`` to a random subset of the blocks in each step; a block is drawn with probability ``share``.

    A block is a repeated layer (the slots whose keys agree up to the first number in them) or, outside of those,
    a module that holds weights: embeddings, final norm and head are blocks of their own. Blocks are drawn
    independently. On those drawn the direction is ``z / sqrt(share)``, so that ``E[z z^T]`` is the identity and
    the estimate unbiased: perturbation and estimate each contribute a factor ``1 / sqrt(share)``. The probes
    keep, on average, the distance from the weights that they have without sampling, and updates are weighted
    by ``1 / share``. So is weight decay; like the update, it leaves out the blocks that are not drawn. Momentum
    counts only the steps in which its block moves.

    With d_b of the d elements in block b, the two-sided estimator over n directions has the second moment
    ``1/n * sum over b of |grad_b|^2 * (d - d_b + (d_b + n + kurtosis - 2) / share)``. With probability
    ``(1 - share)^blocks`` no block is drawn: both sides of a probe then agree, and the step moves nothing.

    Attributes:
        share: probability of a block, above 0 and at most 1 (1 is ``of`` itself).
        of: any noise that does not sample itself; with "low_rank" the drawn blocks are not copied either.
    """

    name: ClassVar[str] = "sampled"
    share: float = 0.5
    of: str | dict[str, Any] | Noise = field(default="rademacher", hash=False)

    def __post_init__(self) -> None:
        check_part("share", self.share, "the probability with which a block moves in a step")
        self._wrap(self.of)
        if isinstance(self.wrapped, Sampled):
            raise ValueError(f"of={self.of!r} is sampled already; write one 'sampled' with the product of the shares")
        if self.wrapped.name in ("coordinates", "one_block"):
            name = self.wrapped.name
            raise ValueError(f"of={self.of!r} chooses weights of the whole model; write noise={name!r} alone")

    def seed(self, base: int, step: int, direction: int) -> int:
        """The seed of ``of`` in the low 128 bits, and above them that of the step's draw."""
        return derive_seed(base, step, 0) << DRAW_BITS | super().seed(base, step, direction)

    def draws(self, seed: int, slot: str) -> bool:
        """Whether the block of a slot moves in the step that a direction's seed belongs to."""
        low, high = stream_key(seed >> DRAW_BITS, block_of(slot), BLOCKS)
        return ((high & MASK32) << 32 | low & MASK32) < self.share * 2.0**64

    def drawn(self, slot: str, terms: Terms) -> Terms:
        """Those of ``terms`` that move a slot, as terms of ``of``."""
        weight = self.share**-0.5
        return tuple((inner_seed(seed), c * weight) for seed, c in terms if self.draws(seed, slot))

    @property
    def plain(self) -> Noise:
        return self.wrapped

    @property
    def of_elements(self) -> bool:
        return self.wrapped.of_elements

    def direction(self, slot: str, shape: torch.Size, terms: Terms, passes: Passes = PLAIN) -> Direction:
        return self.wrapped.direction(slot, shape, self.drawn(slot, terms), passes)

    def rank_of(self, shape: torch.Size, scaling: Scaling | None = None) -> int | None:
        return self.wrapped.rank_of(shape, scaling)

    def prepare(self, seeds: Sequence[int], slots: Sequence[tuple[str, torch.Size]], device: torch.device) -> None:
        if seeds:  # of one step
            drawn = [(key, shape) for key, shape in slots if self.draws(seeds[0], key)]
            super().prepare([inner_seed(seed) for seed in seeds], drawn, device)

    def forget(self, seeds: Sequence[int], late: bool = False) -> None:
        super().forget([inner_seed(seed) for seed in seeds], late)


def inner_seed(seed: int) -> int:
    """The seed of the other noise in that of a direction."""
    return seed & ((1 << DRAW_BITS) - 1)


@lru_cache(maxsize=1 << 16)
def block_of(slot: str) -> str:
    """The name of the block that a slot is in.

    The key up to the first number in it (``model.layers.3``), or else the module that holds the tensor.
    """
    parts = slot.split(".")
    number = next((at for at, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[:-1] if number is None else parts[: number + 1])
