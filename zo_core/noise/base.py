"""What a noise is: a distribution, reached from hash words by a pure function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..registry import Registry
from .hashing import BATCH_WORDS, DIRECTION, stream_key, words


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

    def z(
        self, seed: int, slot: str, start: int, stop: int, device: torch.device | str = "cpu", scale: float = 1.0
    ) -> Tensor:
        """Elements ``start … stop - 1`` of ``scale * z(seed)`` for one slot: a pure function.

        Elements are counted in row-major order of the slot's shape, whatever its strides.

        Returns:
            float32 tensor of shape ``[stop - start]``.
        """
        device = torch.device(device)
        key = stream_key(seed, slot, DIRECTION)
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


NOISES: Registry[Noise] = Registry("noise", Noise)
