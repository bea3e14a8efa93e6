"""What a noise is: a distribution, reached from hash words by a pure function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..cache import end_step
from ..registry import Registry
from .hashing import BATCH_WORDS, DIRECTION, derive_seed, stream_key, words


@dataclass(frozen=True)
class Noise:
    """Distribution of a direction's elements; subclasses say how words become values.

    Class attributes:
        name: its name in the registry.
        values_per_word: how many consecutive elements one 32-bit word serves.
        variance: exact variance of one element.
        signs: whether every value is +1 or -1, so that multiplying by it is exact.
        kurtosis: exact fourth standardised moment. The two-sided estimator over n directions in d
            dimensions then has the second moment ``(d + n + kurtosis - 2) / n * |grad|^2``.
    """

    name: ClassVar[str]
    values_per_word: ClassVar[int]
    variance: ClassVar[float]
    kurtosis: ClassVar[float]
    signs: ClassVar[bool] = False

    def expand(self, bits: Tensor, scale: float, out: Tensor) -> None:
        """Writes ``round(scale * z)`` for the elements of some words.

        Args:
            bits: int32 ``[count]``.
            scale: a float32 value.
            out: float32 ``[count * values_per_word]``. Where `signs`, also a 16-bit type, with scale 1.
        """
        raise NotImplementedError

    def seed(self, base: int, step: int, direction: int) -> int:
        """The seed of one direction of one step: all that its values depend on besides the slot.

        Args:
            base: the run's seed, any integer.
            step: index of the optimizer step, from 0.
            direction: index of the direction within the step, from 0.
        """
        return derive_seed(base, step, direction)

    def prepare(self, seeds: Sequence[int], slots: Sequence[tuple[str, torch.Size]], device: torch.device) -> None:
        """Computes in advance what is cheaper for many slots together; it changes no value."""

    def forget(self, seeds: Sequence[int], late: bool = False) -> None:
        """Lets go of what was kept for the step of these directions, and changes no value.

        What later steps of a window need as well stays; with ``late``, what updates in the next sweep need, too.
        """
        end_step(late)

    def values(
        self, seed: int, slot: str, shape: torch.Size, device: torch.device | str = "cpu", scale: float = 1.0
    ) -> Tensor:
        """``scale * z(seed)`` of one slot as a whole, float32 of its shape."""
        return self.z(seed, slot, 0, torch.Size(shape).numel(), device, scale).view(shape)

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
