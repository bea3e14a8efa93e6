"""Counter-based randomness: every word is a pure function of (seed, slot key, purpose, index).

Nothing here draws from a generator, so the words do not depend on the order in which they are
requested, on chunking, or on the device. All tensor arithmetic is on int32 with wrap-around, which
CPU, CUDA, compiled and Triton code agree on bit for bit. The mixing constants are those of the
public `lowbias32` (32 bit) and `splitmix64` (64 bit) finalisers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from ..cache import ByteCache, kept, kept_for_a_step

MASK32 = 0xFFFFFFFF
MASK64 = 0xFFFFFFFFFFFFFFFF

#: What a stream of words is for; streams of different purposes never coincide.
DIRECTION, ROUNDING, BASIS, BLOCKS = 1, 2, 3, 4

#: Words hashed at once, so that small operations do not dominate (512 KiB, half of a core's L2 here).
BATCH_WORDS = 1 << 17

#: Streams of at most this many words are worth computing together.
SHORT = 1 << 12

#: Elements that share one word on top of the table of rounding bits.
ROUNDING_SPAN = 2 * BATCH_WORDS

Key = tuple[int, int]

#: Maximum memory for words. At one bit per weight it holds a direction of a model with 268 million weights;
#: larger models cycle through it and hash every time, which costs a few percent.
WORD_BYTES = 32 << 20

#: The words of a step, which uses the same ones on each side of a probe and in the update.
_words: ByteCache[Tensor] = ByteCache(WORD_BYTES, per_step=True)

_once = threading.local()


def signed(value: int) -> int:
    """A 32-bit pattern as the int32 that holds it."""
    value &= MASK32
    return value - (1 << 32) if value >> 31 else value


MUL1, MUL2 = signed(0x7FEB352D), signed(0x846CA68B)


def mix64(value: int) -> int:
    """A bijection of 64-bit integers in which every input bit affects every output bit."""
    value = (value + 0x9E3779B97F4A7C15) & MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK64
    return value ^ (value >> 31)


def derive_seed(base: int, step: int, direction: int) -> int:
    """The seed of one direction of one step: the only seed derivation in the library.

    Args:
        base: the run's seed, any integer.
        step: index of the optimizer step, from 0.
        direction: index of the direction within the step, from 0.

    Returns:
        An integer in ``[0, 2**63)``.
    """
    return mix64(mix64(mix64(base & MASK64) ^ (step & MASK64)) ^ (direction & MASK64)) >> 1


@lru_cache(maxsize=1 << 16)
def _digest(slot: str) -> int:
    return int.from_bytes(blake2b(slot.encode(), digest_size=8).digest(), "little")


def mix32(value: int) -> int:
    """`_mix32_` of one word, in plain integers."""
    for shift, multiplier in ((16, MUL1), (15, MUL2)):
        value = (value ^ value >> shift) * multiplier & MASK32
    return value ^ value >> 16


@kept_for_a_step
def stream_key(seed: int, slot: str, purpose: int) -> Key:
    """The key of one stream of words, as two int32. The probes of a direction and its update ask for the same one."""
    mixed = mix64(mix64(seed & MASK64) ^ _digest(slot) ^ (purpose << 56))
    return signed(mixed), signed(mixed >> 32)


@kept(4 << 20)
def _counter(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(BATCH_WORDS, dtype=torch.int32, device=device)


def _mix32_(x: Tensor) -> Tensor:
    """One in-place round of mixing. ``>>`` of int32 is arithmetic, hence the masks."""
    for shift, multiplier in ((16, MUL1), (15, MUL2)):
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << (32 - shift)) - 1)).mul_(multiplier)
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def words(key: Key, start: int, count: int, device: torch.device) -> Tensor:
    """Words ``start … start + count - 1`` of a stream of directions.

    Args:
        key: from `stream_key`.
        start: index of the first word; beyond 2**32 the high part is folded into the key.
        count: no multiple of 2**32 may lie between first and last word.
        device: where to compute; the bits are the same everywhere.

    Returns:
        int32 tensor of shape ``[count]``; do not write to it.
    """
    name = (key, start, count, device)
    x = _words.get(name)
    if x is None:
        # Two rounds with half of the key between them, so that streams share no structure.
        x = _mix32_(_first_round(key, start, count, device).add_(key[1]))
        if not getattr(_once, "entered", False):
            _words.put(name, x)
    return x


@contextmanager
def used_once() -> Iterator[None]:
    """A context in which words are not cached, for updates of a finished step, after which they are not needed."""
    before, _once.entered = getattr(_once, "entered", False), True
    try:
        yield
    finally:
        _once.entered = before


def sent(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A small tensor of numbers on a device. `torch.tensor` there would wait for all that is queued on a GPU."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def first_words(keys: Sequence[Key], counts: Sequence[int], device: torch.device) -> Tensor:
    """The first words of several streams, concatenated: as from `words`, but computed together for many short streams.

    Args:
        keys: from `stream_key`.
        counts: number of words of each stream, below 2**31 in total.
        device: where to compute; the bits are the same everywhere.

    Returns:
        int32 tensor of shape ``[sum(counts)]``.
    """
    with torch.inference_mode(False):
        repeats = sent(counts, device)
        begins = (repeats.cumsum(0) - repeats).to(torch.int32)
        low, high, begin = (
            torch.repeat_interleave(one, repeats, output_size=sum(counts))
            for one in (*sent(keys, device, torch.int32).t(), begins)
        )
        x = torch.arange(sum(counts), dtype=torch.int32, device=device).sub_(begin)
        return _mix32_(_mix32_(x.bitwise_xor_(low)).add_(high))


def prepare_words(keys: Sequence[Key], counts: Sequence[int], device: torch.device) -> None:
    """Computes the first words of several short streams in advance for `words`, which computes those of long ones."""
    missing = [
        (key, count)
        for key, count in zip(keys, counts, strict=True)
        if count <= SHORT and _words.get((key, 0, count, device)) is None
    ]
    if missing:
        pieces = first_words([key for key, _ in missing], [count for _, count in missing], device)
        for (key, count), piece in zip(missing, pieces.split([count for _, count in missing]), strict=True):
            _words.put((key, 0, count, device), piece)


def _first_round(key: Key, start: int, count: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        if count <= BATCH_WORDS:
            x = _counter(device)[:count] + signed(start)
        else:
            x = torch.arange(count, dtype=torch.int32, device=device).add_(signed(start))
        return _mix32_(x.bitwise_xor_(signed(key[0] + (start >> 32) * 0x9E3779B9)))


@kept(8 << 20, per_step=True)
def _rounding_table(key: int, dropped: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        halves = _first_round((key, 0), 0, ROUNDING_SPAN // 2, device).view(torch.int16)
        return halves.to(torch.int32).bitwise_and_((1 << dropped) - 1)


def rounding_bits(key: Key, dropped: int, start: int, count: int, device: torch.device) -> Tensor:
    """Random numbers of ``dropped`` bits for the elements ``start … start + count - 1`` of a slot.

    A step hashes one table of `ROUNDING_SPAN` numbers, and every span of a slot has a word of its own
    that is xored into all of it. Any two numbers of a step are therefore independent, which is all that
    means and variances of sums depend on; three or more of them need not be.

    Args:
        key: of the table (the same for all slots of a step), and of the slot.
        dropped: at most 16.
        start: index of the first element.
        count: number of elements.
        device: where to compute; the bits are the same everywhere.

    Returns:
        int32 tensor of shape ``[count]``.
    """
    span, at = divmod(start, ROUNDING_SPAN)
    table = _rounding_table(key[0], dropped, device)
    masks = [
        mix32(key[1] + one * 0x9E3779B9 & MASK32) & ((1 << dropped) - 1)
        for one in range(span, -(-(start + count) // ROUNDING_SPAN))
    ]
    if len(masks) == 1:
        return table[at : at + count] ^ masks[0]
    return (table ^ sent(masks, device, torch.int32).unsqueeze(1)).view(-1)[at : at + count]
