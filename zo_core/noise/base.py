"""The interface of noises: directions as pure functions of a seed, and the distribution of their elements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..cache import end_step
from ..registry import Registry
from .direction import PLAIN, Direction, Passes, Scaling, Terms
from .hashing import BATCH_WORDS, DIRECTION, derive_seed, stream_key, words


@dataclass(frozen=True)
class Noise:
    """Defines the direction of each slot as a function of a seed. A noise uses no random generator.

    Class attributes:
        name: its name in the registry.
        share: the probability that a slot moves in a step.
    """

    name: ClassVar[str]
    share = 1.0

    @property
    def of_elements(self) -> bool:
        """Whether each element of a direction depends on its own index alone, so that parts of slots can move."""
        return False

    @property
    def plain(self) -> Noise:
        """The noise of the slots that move in a step: this one, unless it samples slots."""
        return self

    def over(self, slots: Sequence[tuple[str, torch.Size]]) -> Noise:
        """The noise for a model: this one, unless a direction depends on what else moves.

        Args:
            slots: key and shape of each slot that moves, in the order of `by_number`, which does not depend on where
                they came from: a replay has them in the order of a file.

        Raises:
            ConfigError: it does not work with so many weights.
        """
        return self

    def share_in(self, directions: int) -> float:
        """The share of the steps with so many directions in which a slot moves; weight decay is divided by it."""
        return self.share

    def seed(self, base: int, step: int, direction: int) -> int:
        """The seed of one direction of one step; its values depend only on this seed and the slot.

        Args:
            base: the run's seed, any integer.
            step: index of the optimizer step, from 0.
            direction: index of the direction within the step, from 0.
        """
        return derive_seed(base, step, direction)

    def direction(self, slot: str, shape: torch.Size, terms: Terms, passes: Passes = PLAIN) -> Direction:
        """The sum of several directions for one slot; it is `Direction.still` if the slot does not move.

        Args:
            slot: key of the slot.
            shape: shape of the slot.
            terms: pairs ``(seed, c)`` of a direction and its coefficient.
            passes: how the passes over the weights are computed.
        """
        raise NotImplementedError

    def values(
        self, seed: int, slot: str, shape: torch.Size, device: torch.device | str = "cpu", scale: float = 1.0
    ) -> Tensor:
        """``scale`` times the whole direction of one slot, float32 of its shape; masks are not applied."""
        direction = self.direction(slot, torch.Size(shape), ((seed, scale),))
        if direction.still:
            return torch.zeros(shape, dtype=torch.float32, device=device)
        return direction.values(torch.Size(shape), torch.device(device))

    def rank_of(self, shape: torch.Size, scaling: Scaling | None = None) -> int | None:
        """Rank of such a slot's direction, whose updates may be pending until a window ends; None for full rank."""
        return None

    def words_of(self, shape: torch.Size) -> int:
        """Number of 32-bit hash words for the direction of a full-rank slot."""
        raise NotImplementedError

    def prepare(self, seeds: Sequence[int], slots: Sequence[tuple[str, torch.Size]], device: torch.device) -> None:
        """Computes in advance what is cheaper for many slots together; it changes no value.

        What is kept counts towards the bounds of the caches: 32 MiB for words and 64 MiB for left factors. While it
        runs, the left factors of all seeds and slots exist at once, as float32.

        Args:
            seeds: seeds of the directions of one step.
            slots: key and shape of each slot.
            device: where to compute.
        """

    def forget(self, seeds: Sequence[int], late: bool = False) -> None:
        """Drops what was kept for the step of these directions; it changes no value.

        What later steps of a window need is kept, and with ``late`` also what updates in the next sweep need.
        """
        end_step(late)


@dataclass(frozen=True)
class ElementNoise(Noise):
    """Independent elements of one distribution; subclasses define how words become values.

    Class attributes:
        values_per_word: number of consecutive elements per 32-bit word.
        variance: exact variance of one element.
        signs: whether every value is +1 or -1, so that multiplying by it is exact.
        kurtosis: exact fourth standardised moment. The two-sided estimator over n directions in d
            dimensions then has the second moment ``(d + n + kurtosis - 2) / n * |grad|^2``.
    """

    values_per_word: ClassVar[int]
    variance: ClassVar[float]
    kurtosis: ClassVar[float]
    signs: ClassVar[bool] = False

    @property
    def of_elements(self) -> bool:
        return True

    def expand(self, bits: Tensor, scale: float, out: Tensor) -> None:
        """Writes ``round(scale * z)`` for the elements of some words.

        Args:
            bits: int32 ``[count]``.
            scale: a float32 value.
            out: float32 ``[count * values_per_word]``. If `signs`, also a 16-bit type, with scale 1.
        """
        raise NotImplementedError

    def direction(self, slot: str, shape: torch.Size, terms: Terms, passes: Passes = PLAIN) -> Direction:
        return Direction.of(self, slot, terms, passes)

    def words_of(self, shape: torch.Size) -> int:
        return -(-shape.numel() // self.values_per_word)

    def z(
        self,
        seed: int,
        slot: str,
        start: int,
        stop: int,
        device: torch.device | str = "cpu",
        scale: float = 1.0,
        purpose: int = DIRECTION,
    ) -> Tensor:
        """Elements ``start … stop - 1`` of ``scale * z(seed)`` for one slot: a pure function.

        Elements are counted in row-major order of the slot's shape, whatever its strides.

        Returns:
            float32 tensor of shape ``[stop - start]``.
        """
        device = torch.device(device)
        key = stream_key(seed, slot, purpose)
        per_word = self.values_per_word
        first, last = start // per_word, -(-stop // per_word)
        values = torch.empty((last - first) * per_word, dtype=torch.float32, device=device)
        at = first
        while at < last:
            count = min(BATCH_WORDS - at % BATCH_WORDS, last - at)
            out = values[(at - first) * per_word : (at - first + count) * per_word]
            self.expand(words(key, at, count, device), scale, out)
            at += count
        return values[start - first * per_word : stop - first * per_word]

    def stack(self, seeds: Sequence[int], slot: str, numel: int, device: torch.device) -> Tensor:
        """``z(seed)`` of one slot for several seeds, float32 ``[len(seeds), numel]``."""
        count = -(-numel // self.values_per_word)
        if count > BATCH_WORDS:
            return torch.stack([self.z(seed, slot, 0, numel, device) for seed in seeds])
        bits = torch.cat([words(stream_key(seed, slot, DIRECTION), 0, count, device) for seed in seeds])
        values = torch.empty(len(bits) * self.values_per_word, dtype=torch.float32, device=device)
        self.expand(bits, 1.0, values)
        return values.view(len(seeds), -1)[:, :numel]


NOISES: Registry[Noise] = Registry("noise", Noise)
