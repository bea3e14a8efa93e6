"""Directions that move one block of the model each: block-wise estimates (ZO-Bench, arXiv 2402.11592)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from .base import NOISES, Noise
from .direction import PLAIN, Direction, Passes, Scaling, Terms
from .hashing import derive_seed
from .sampled import DRAW_BITS, block_of, inner_seed
from .wrapping import Wrapping

ORDERS = ("turn", "random")


@NOISES.register
@dataclass(frozen=True)
class OneBlock(Wrapping):
    """Applies ``of`` to one block per direction; consecutive directions of a step have consecutive blocks.

    A block is what it is for "sampled": a repeated layer, or else a module that holds weights. Of B blocks, direction
    i of a step moves number ``first + i`` (modulo B) along ``sqrt(B) z``. Then ``E[z z^T]`` is the identity as with
    other noises, probes are as far from the weights, and with B directions the estimate is the sum of one for each
    block. Blocks that no direction of a step moves are neither copied nor written. Weight decay is divided by the
    share of the steps in which a block moves, and applied in these.

    Attributes:
        order: which block is first. "turn" goes one further with each step, from one that depends on the run's seed;
            "random" draws one for each step.
        of: any noise that does not choose blocks itself.
    """

    name: ClassVar[str] = "one_block"
    order: str = "turn"
    of: str | dict[str, Any] | Noise = field(default="rademacher", hash=False)

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order={self.order!r} is not known; write one of {', '.join(map(repr, ORDERS))}")
        self._wrap(self.of)
        if isinstance(self.wrapped, Wrapping) and self.wrapped.name != "sparse":
            raise ValueError(f"of={self.of!r} chooses blocks already; write of='rademacher' or another plain noise")
        if self.wrapped.name == "coordinates":
            raise ValueError(f"of={self.of!r} chooses weights of the whole model; write noise='coordinates' alone")

    @property
    def blocks(self) -> dict[str, int]:
        """The number of each block; without a model everything is one block."""
        found: dict[str, int] = self.__dict__.get("known", {})
        return found

    def over(self, slots: Sequence[tuple[str, torch.Size]]) -> Noise:
        bound = replace(self)
        names = dict.fromkeys(block_of(key) for key, _ in slots)
        object.__setattr__(bound, "known", {name: index for index, name in enumerate(names)})
        return bound

    def share_in(self, directions: int) -> float:
        return min(1.0, directions / max(1, len(self.blocks)))

    def seed(self, base: int, step: int, direction: int) -> int:
        """The seed of ``of`` in the low 128 bits, and above them a number that is its block's modulo B."""
        first = derive_seed(base, 0, 0) + step if self.order == "turn" else derive_seed(base, step, 0)
        return first + direction << DRAW_BITS | super().seed(base, step, direction)

    def moves(self, seed: int, slot: str) -> bool:
        """Whether a direction moves the block of a slot."""
        blocks = self.blocks
        return not blocks or (seed >> DRAW_BITS) % len(blocks) == blocks[block_of(slot)]

    @property
    def of_elements(self) -> bool:
        return self.wrapped.of_elements

    @property
    def plain(self) -> Noise:
        return self.wrapped

    def direction(self, slot: str, shape: torch.Size, terms: Terms, passes: Passes = PLAIN) -> Direction:
        weight = math.sqrt(max(1, len(self.blocks)))
        own = tuple((inner_seed(seed), c * weight) for seed, c in terms if self.moves(seed, slot))
        return self.wrapped.direction(slot, shape, own, passes)

    def rank_of(self, shape: torch.Size, scaling: Scaling | None = None) -> int | None:
        return self.wrapped.rank_of(shape, scaling)

    def prepare(self, seeds: Sequence[int], slots: Sequence[tuple[str, torch.Size]], device: torch.device) -> None:
        for seed in seeds:
            moving = [(key, shape) for key, shape in slots if self.moves(seed, key)]
            super().prepare([inner_seed(seed)], moving, device)

    def forget(self, seeds: Sequence[int], late: bool = False) -> None:
        super().forget([inner_seed(seed) for seed in seeds], late)
