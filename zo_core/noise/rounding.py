"""Rounding of float32 results into 16-bit weights.

A zeroth-order update is far below one unit in the last place of a 16-bit weight, so rounding to
nearest swallows it: at ``lr * g = 1e-6`` only 9.5% of fp16 and 1.2% of bf16 weights would move. With
stochastic rounding the *expected* new weight is exact. The random bits are hash words, so the
result is deterministic and a run can be replayed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .hashing import ROUNDING, Key, rounding_bits, stream_key
from .parts import Band

#: float32 mantissa bits that a 16-bit type drops.
DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}

FP16_NORMAL = 2.0**-14
FP16_STEPS = 2.0**24


def rounding_key(seed: int, slot: str) -> Key:
    """The key of the random bits of one slot; its first half depends only on the seed, as slots share a table."""
    return stream_key(seed, "", ROUNDING)[0], stream_key(seed, slot, ROUNDING)[1]


def stochastic_round(values: Tensor, dtype: torch.dtype, key: Key, start: int | Band, back: bool = False) -> Tensor:
    """Rounds up or down with probabilities that make the result right on average.

    Values that ``dtype`` can hold are returned unchanged, whatever the bits.

    Args:
        values: float32 ``[n]``; overwritten.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
        key: of the random bits, from `rounding_key`.
        start: index of the first value within its slot, or the band in which the values of a part lie.
        back: round a move that reverts one with the same key. The bits are then complemented, so that
            ``round_back(round(theta - s) + s)`` is theta: rounding up by chance is undone as if it were known.

    Returns:
        ``[n]`` in float32, holding values that ``dtype`` represents exactly.
    """
    dropped = DROPPED_BITS[dtype]
    # A GPU writes NaN as 0x7fffffff, and adding to that would make it -0.0; torch writes it as 0x7fc00000.
    values.nan_to_num_(nan=math.nan, posinf=math.inf, neginf=-math.inf)
    if isinstance(start, Band):
        random = start.picked(lambda first, count: rounding_bits(key, dropped, first, count, values.device))
    else:
        random = rounding_bits(key, dropped, start, values.numel(), values.device)
    if back:
        random = random ^ ((1 << dropped) - 1)
    if dtype == torch.float16:
        # Below 2**-14 the steps of fp16 are 2**-24 apart, whatever the exponent.
        fraction = random.to(torch.float32).mul_(2.0**-dropped)
        small = (values * FP16_STEPS).add_(fraction).floor_().div_(FP16_STEPS)
        is_small = values.abs() < FP16_NORMAL
    rounded = values.view(torch.int32).add_(random).bitwise_and_(-(1 << dropped)).view(torch.float32)
    return torch.where(is_small, small, rounded) if dtype == torch.float16 else rounded


def store(values: Tensor, out: Tensor, key: Key | None, start: int | Band, back: bool = False) -> None:
    """Writes float32 ``values`` into 16-bit ``out``, rounding by ``key`` (None: to nearest); see `stochastic_round`."""
    if key is None:
        out.copy_(values)
        return
    out.copy_(stochastic_round(values, out.dtype, key, start, back))
