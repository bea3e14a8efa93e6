"""The arithmetic of `direction` in one Triton kernel: one launch a slot, one pass over the weights.

No words are stored: each thread hashes those of its own eight elements, which share them (22 integer
operations a word). Compiled for an H200 that is 22 instructions an element to perturb bf16 weights by
signs, in total, of the 33 or so that fit into the time in which the memory moves them. A Gaussian
element costs 14 more and a gather from 128 KiB of table. These are counts of instructions and
data-sheet rates, not measurements.

The bits equal those of the eager passes because of 32-bit integers that wrap around, no fused
multiply-add, sums from left to right, and bf16 values converted from and to integers by bit operations.
"""

# Kernels are written in Triton's own types.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .direction import Direction, flat, flat_target
from .gaussian import Gaussian, table
from .hashing import MASK32, MUL1, MUL2, ROUNDING_SPAN, sent
from .rademacher import Rademacher, float_bits
from .rounding import DROPPED_BITS, FP16_NORMAL, FP16_STEPS

#: Elements of one program: a power of two, so that its words share their high half. With four warps a
#: thread has eight elements; with sixteen the compiler no longer sees which of them share a word.
BLOCK = 1024

#: Terms are unrolled, or neighbours would not share words: 3 to 6 s to compile for 32, 4 to 17 for 64.
MAX_TERMS = 32

_MUL1 = tl.constexpr(MUL1 & MASK32)
_MUL2 = tl.constexpr(MUL2 & MASK32)
_SPAN = tl.constexpr(ROUNDING_SPAN)
_FP16_NORMAL = tl.constexpr(FP16_NORMAL)
_FP16_STEPS = tl.constexpr(FP16_STEPS)


def supports(direction: Direction, dtype: torch.dtype) -> bool:
    """Whether there is a fused form: not for float64 weights, user-defined noises, or very many terms."""
    return (
        type(direction.noise) in (Rademacher, Gaussian)
        and dtype in (torch.float32, *DROPPED_BITS)
        and len(direction.terms) <= MAX_TERMS
    )


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * _MUL1
    x = (x ^ (x >> 15)) * _MUL2
    return x ^ (x >> 16)


@triton.jit
def _words(first, offset, key0, key1):
    """`hashing.words`: those at ``offset`` (uint32) from the word ``first`` (int64 scalar)."""
    key = key0.to(tl.uint32) + (first >> 32).to(tl.uint32) * 0x9E3779B9
    return _mix(_mix((first.to(tl.uint32) + offset) ^ key) + key1.to(tl.uint32))


@triton.jit
def _rounding_bits(start, lane, key0, key1, DROPPED: tl.constexpr):
    """`hashing.rounding_bits` of the elements ``start + lane``, all of one span."""
    word = _mix((((start % _SPAN) >> 1).to(tl.uint32) + (lane >> 1)) ^ key0.to(tl.uint32))
    mask = _mix(key1.to(tl.uint32) + (start // _SPAN).to(tl.uint32) * 0x9E3779B9)
    return ((word >> ((lane & 1) * 16)) ^ mask) & ((1 << DROPPED) - 1)


@triton.jit
def _term(start, lane, key0, key1, coefficient, levels):
    """``round(c * z)`` of the elements ``start + lane``; the coefficient comes as its bits."""
    if levels is None:
        word = _words(start >> 5, lane >> 5, key0, key1)
        sign = (word << (31 - (lane & 31))) & 0x80000000
        value = (sign ^ coefficient.to(tl.uint32)).to(tl.float32, bitcast=True)
    else:
        word = _words(start >> 1, lane >> 1, key0, key1)
        level = (word >> ((lane & 1) * 16)) & 0xFFFF
        # The upper half of the table is the lower one mirrored and negated: half of it stays cached.
        upper = level >> 15
        quantile = tl.load(levels + ((level ^ (0 - upper)) & 0x7FFF), eviction_policy="evict_last")
        quantile = (quantile.to(tl.uint32, bitcast=True) ^ (upper << 31)).to(tl.float32, bitcast=True)
        value = quantile * coefficient.to(tl.float32, bitcast=True)
    return value


@triton.jit(do_not_specialize=["key0", "key1", "coefficient", "decay", "rounding0", "rounding1"])
def _add_kernel(
    theta,
    out,
    levels,
    terms,
    key0,
    key1,
    coefficient,
    decay,
    rounding0,
    rounding1,
    count,
    TERMS: tl.constexpr,
    BFLOAT16: tl.constexpr,
    DROPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of ``out = round(decay * theta + s)``.

    Args:
        theta: pointer to the weights: float32, float16, or bf16 as int16.
        out: pointer of the same type, possibly the same one.
        levels: pointer to the Gaussian table; None for signs.
        terms: pointer to the terms after the first, ``[TERMS - 1, 3]`` int32; None if there are none.
        key0: with key1 and coefficient (the bits of a float32), the first term.
        decay: the bits of a float32. Multiplying by 1 is exact and needs no case of its own.
        rounding0: with rounding1, the key of the rounding bits.
        count: number of weights.
        TERMS: how many there are.
        BFLOAT16: whether int16 holds bf16 bits.
        DROPPED: random bits for stochastic rounding; 0 rounds to nearest even.
        BLOCK: elements of one program.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    index = tl.arange(0, BLOCK)
    inside = index < count - start
    lane = index.to(tl.uint32)

    total = _term(start, lane, key0, key1, coefficient, levels)
    for term in tl.static_range(1, TERMS):
        at = terms + 3 * term
        total += _term(start, lane, tl.load(at - 3), tl.load(at - 2), tl.load(at - 1), levels)

    weights = tl.load(theta + start + index, mask=inside, eviction_policy="evict_first")
    if BFLOAT16:
        weights = (weights.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    value = weights.to(tl.float32) * decay.to(tl.float32, bitcast=True) + total

    if DROPPED:
        random = _rounding_bits(start, lane, rounding0, rounding1, DROPPED)
    bits = value.to(tl.uint32, bitcast=True)
    # NaN is kept apart: a GPU writes it as 0x7fffffff, and adding to that would make it a number.
    if BFLOAT16:
        bits += random if DROPPED else 0x7FFF + ((bits >> 16) & 1)
        result = tl.where(value == value, bits >> 16, 0x7FC0).to(tl.int16)
    elif DROPPED:
        rounded = (((bits + random) >> DROPPED) << DROPPED).to(tl.float32, bitcast=True)
        fraction = random.to(tl.float32) * (1.0 / (1 << DROPPED))
        small = tl.floor(value * _FP16_STEPS + fraction) * (1.0 / _FP16_STEPS)
        rounded = tl.where(tl.abs(value) < _FP16_NORMAL, small, rounded)
        result = tl.where(value == value, rounded, value).to(tl.float16)
    else:
        result = value.to(out.dtype.element_ty)
    tl.store(out + start + index, result, mask=inside)


def add_direction(direction: Direction, theta: Tensor, decay: float, out: Tensor) -> None:
    """``out = round(decay * theta + s)`` with the bits of `Direction.add_to`.

    One launch on the current stream, without waiting for the device. A first term travels with the
    launch; further ones through pinned memory.

    Args:
        direction: one that `supports` accepts.
        theta: CUDA weights of any shape and strides (CPU tensors under ``TRITON_INTERPRET=1``).
        decay: a float32 value.
        out: where the result goes; ``theta`` itself, or no memory of it.
    """
    # The kernel counts in elements from the first address, so a flat view with gaps is copied.
    source, target = flat(theta).contiguous(), flat_target(theta, out)
    rounding_key = direction.rounding_key(theta.dtype)
    levels = table(theta.device) if isinstance(direction.noise, Gaussian) else None
    keys = direction.keys()
    rows = [(*key, float_bits(c)) for key, c in keys]
    terms = sent(rows[1:], theta.device, torch.int32) if len(rows) > 1 else None
    bfloat16 = theta.dtype == torch.bfloat16
    count = source.numel()
    if count:
        with torch.cuda.device_of(theta):
            _add_kernel[(triton.cdiv(count, BLOCK),)](
                source.view(torch.int16) if bfloat16 else source,
                target.view(torch.int16) if bfloat16 else target,
                levels,
                terms,
                *rows[0],
                float_bits(decay),
                *(rounding_key or (0, 0)),
                count,
                TERMS=len(rows),
                BFLOAT16=bfloat16,
                DROPPED=0 if rounding_key is None else DROPPED_BITS[theta.dtype],
                BLOCK=BLOCK,
                num_warps=4,
                enable_fp_fusion=False,
                sanitize_overflow=False,
            )
    if target.data_ptr() != out.data_ptr():
        out.copy_(target.view(out.shape))
