"""Directions that move one weight each: coordinate-wise estimates (CGE; DeepZero, arXiv 2310.02025)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from .base import NOISES, Noise
from .direction import PLAIN, Direction, Passes, Terms, float32
from .hashing import derive_seed, sent
from .rademacher import Rademacher

#: Largest number of weights that move: an estimate of all of their gradient takes two forwards for each of them.
MOST = 1 << 17


@NOISES.register
@dataclass(frozen=True)
class Coordinates(Noise):
    """``sqrt(d) e_k``: one of the d weights per direction; those of a step are consecutive, from a random first one.

    ``E[z z^T]`` is the identity as with other noises, and a probe is as far from the weights: it moves one weight by
    ``eps sqrt(d)``. With ``num_probes=d`` a step measures every weight once, and the estimate is the gradient up to
    the error of its differences: no part of it is random. A model of more than 131,072 weights is an error.
    """

    name: ClassVar[str] = "coordinates"

    def over(self, slots: Sequence[tuple[str, torch.Size]]) -> Noise:
        count, firsts = 0, {}
        for key, shape in slots:
            firsts[key] = count
            count += shape.numel()
        if count > MOST:
            raise ConfigError(
                [
                    f"noise='coordinates' moves one weight at a time, and {count:,} weights move, for each of which a "
                    f"full estimate takes two forwards; train at most {MOST:,} of them (an adapter, or the head), or "
                    "write noise='one_block' or 'rademacher'"
                ]
            )
        bound = replace(self)
        object.__setattr__(bound, "known", (firsts, count))
        return bound

    def seed(self, base: int, step: int, direction: int) -> int:
        """A number that modulo d is the index of the weight."""
        return derive_seed(base, step, 0) + direction

    def direction(self, slot: str, shape: torch.Size, terms: Terms, passes: Passes = PLAIN) -> Direction:
        firsts, count = self.__dict__.get("known", ({slot: 0}, shape.numel()))
        how = Rademacher(), slot, terms, passes.rounding_seed, "eager", passes.scaling
        return OneHotDirection(*how, first=firsts[slot], count=max(1, count))

    def words_of(self, shape: torch.Size) -> int:
        return 0


@dataclass(frozen=True)
class OneHotDirection(Direction):
    """Single weights of a slot: ``round(c sqrt(d))`` for each term whose index is in it, summed in float32.

    A slot without any of the weights moves by 0, because weight decay is that of all weights in every step.

    Attributes:
        first: index of the slot's first weight among all.
        count: d.
    """

    first: int = 0
    count: int = 1

    def misses(self, numel: int) -> bool:
        return not any(0 <= seed % self.count - self.first < numel for seed, _ in self.terms)

    def chunks(self, numel: int, device: torch.device) -> Iterator[tuple[int, int, Tensor]]:
        weight, moves = math.sqrt(self.count), dict[int, float]()
        for seed, c in self.terms:
            index = seed % self.count - self.first
            if 0 <= index < numel:
                moves[index] = float32(moves.get(index, 0.0) + float32(c * weight))
        values = torch.zeros(numel, dtype=torch.float32, device=device)
        if moves:
            values[sent(list(moves), device)] = sent(list(moves.values()), device, torch.float32)
        yield 0, numel, values

    @property
    def _signs_alone(self) -> bool:
        return False
