"""Signs: the default noise. Exact on every device, and the lowest variance of the estimator."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..cache import kept
from .base import NOISES, ElementNoise

SIGN_BIT = -(1 << 31)


def float_bits(value: float) -> int:
    """The int32 that has the bits of a float32."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


@kept(1 << 16)
def _shifts(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(31, -1, -1, dtype=torch.int32, device=device)


@kept(1 << 18)
def _octets(dtype: torch.dtype, device: torch.device) -> Tensor:
    """For each byte its eight signs in a 16-bit type, in the 16 bytes of one complex128 number."""
    with torch.inference_mode(False):
        byte = torch.arange(256, device=device).unsqueeze(1)
        signs = 1 - 2 * (byte >> torch.arange(8, device=device) & 1)
        return signs.to(dtype).view(torch.complex128).view(-1)


@NOISES.register
@dataclass(frozen=True)
class Rademacher(ElementNoise):
    """Independent, equally likely +1 and -1; bit ``i % 32`` of word ``i // 32`` is the sign of element i."""

    name: ClassVar[str] = "rademacher"
    values_per_word: ClassVar[int] = 32
    variance: ClassVar[float] = 1.0
    kurtosis: ClassVar[float] = 1.0
    signs: ClassVar[bool] = True

    def expand(self, bits: Tensor, scale: float, out: Tensor) -> None:
        if out.dtype != torch.float32:
            index = bits.view(torch.uint8).to(torch.int32)
            torch.index_select(_octets(out.dtype, out.device), 0, index, out=out.view(torch.complex128))
            return
        # The bit is moved to the sign's place and the scale's own bits are laid under it: no table,
        # no conversion, and multiplying by a sign is exact.
        values = out.view(torch.int32).view(-1, 32)
        torch.bitwise_left_shift(bits.unsqueeze(1), _shifts(bits.device), out=values)
        values.bitwise_and_(SIGN_BIT).bitwise_xor_(float_bits(scale))
