"""The Triton kernels: one family for every elementwise pass over weights.

No words are stored: each thread hashes those of its own eight elements, which share them (22 integer
operations a word).

The bits equal those of the eager passes because of 32-bit integers that wrap around, no fused
multiply-add, sums from left to right, and bf16 values converted from and to integers by bit operations.
"""

# Kernels are written in Triton's own types.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from .hashing import MASK32, MUL1, MUL2, ROUNDING_SPAN
from .rounding import FP16_NORMAL, FP16_STEPS

#: Elements of one program: a power of two, so that its words share their high half. With four warps a
#: thread has eight elements; with sixteen the compiler no longer sees which of them share a word.
BLOCK = 1024

#: Kinds of a pass, and of what it moves: ordinary weights, scales by an amount, scales by a fraction of themselves.
ADD, SIGN, MOMENTUM = 0, 1, 2
WEIGHTS, ABSOLUTE, RELATIVE = 0, 1, 2

#: Columns of a row of the table; after them come key, key and coefficient of each term. Addresses are in bytes,
#: float32 values are given by their bits.
THETA, OUT, STATE, COUNT, DECAY, RATE, BETA, LIMIT, FLOOR, ROUNDING, TERM = 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11

_MUL1 = tl.constexpr(MUL1 & MASK32)
_MUL2 = tl.constexpr(MUL2 & MASK32)
_SPAN = tl.constexpr(ROUNDING_SPAN)
_FP16_NORMAL = tl.constexpr(FP16_NORMAL)
_FP16_STEPS = tl.constexpr(FP16_STEPS)
_ADD, _SIGN, _MOMENTUM = tl.constexpr(ADD), tl.constexpr(SIGN), tl.constexpr(MOMENTUM)
_WEIGHTS, _ABSOLUTE, _RELATIVE = tl.constexpr(WEIGHTS), tl.constexpr(ABSOLUTE), tl.constexpr(RELATIVE)
_THETA, _OUT, _STATE, _COUNT = tl.constexpr(THETA), tl.constexpr(OUT), tl.constexpr(STATE), tl.constexpr(COUNT)
_DECAY, _RATE, _BETA, _LIMIT = tl.constexpr(DECAY), tl.constexpr(RATE), tl.constexpr(BETA), tl.constexpr(LIMIT)
_FLOOR, _ROUNDING, _TERM = tl.constexpr(FLOOR), tl.constexpr(ROUNDING), tl.constexpr(TERM)


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
def _number(bits):
    """The float32 with these bits."""
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


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
        value = quantile * _number(coefficient)
    return value


@triton.jit
def _loaded(pointers, inside, BFLOAT16: tl.constexpr):
    """Weights as float32; bf16 comes as int16."""
    weights = tl.load(pointers, mask=inside, eviction_policy="evict_first")
    if BFLOAT16:
        weights = (weights.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return weights.to(tl.float32)


@triton.jit
def _rounded(value, start, lane, rounding0, rounding1, dtype, BFLOAT16: tl.constexpr, DROPPED: tl.constexpr):
    """float32 values in the type of the weights; DROPPED random bits decide, or 0 rounds to nearest even."""
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
        result = value.to(dtype)
    return result


@triton.jit(do_not_specialize=["address", "count"])
def fetch_kernel(address, values, count, BLOCK: tl.constexpr):
    """One block of a copy of int64 numbers.

    Args:
        address: of the numbers, in memory that the device can read; int64.
        values: where they go.
        count: how many there are.
        BLOCK: numbers of one program.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    numbers = address.to(tl.int64).to(tl.pointer_type(tl.int64))
    tl.store(values + index, tl.load(numbers + index, mask=inside, other=0), mask=inside)


@triton.jit(do_not_specialize=["key0", "key1", "coefficient", "decay", "rounding0", "rounding1"])
def add_kernel(
    theta,
    out,
    levels,
    key0,
    key1,
    coefficient,
    decay,
    rounding0,
    rounding1,
    count,
    BFLOAT16: tl.constexpr,
    DROPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of ``out = round(decay * theta + round(c * z))``, the pass of most probes; all comes with the launch.

    Args:
        theta, out: flat; bf16 as int16.
        levels: the table of quantiles for normal noise, or None for signs.
        key0, key1, coefficient: of the term.
        decay: a factor for ``theta``; both numbers are float32 values given by their bits.
        rounding0, rounding1: key of the rounding bits.
        count: number of elements.
        BFLOAT16: whether these are bf16.
        DROPPED: random bits for stochastic rounding; 0 rounds to nearest even.
        BLOCK: elements of one program.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    index = tl.arange(0, BLOCK)
    inside = index < count - start
    lane = index.to(tl.uint32)
    total = _term(start, lane, key0, key1, coefficient, levels)
    value = _loaded(theta + start + index, inside, BFLOAT16) * _number(decay) + total
    result = _rounded(value, start, lane, rounding0, rounding1, out.dtype.element_ty, BFLOAT16, DROPPED)
    tl.store(out + start + index, result, mask=inside)


@triton.jit
def _row(table, rows, steps, terms, program):
    """The row of the table that a program works on, and the index of its block within that tensor."""
    low = tl.zeros((), tl.int32)
    high = low + rows
    for _ in range(steps):
        middle = (low + high) // 2
        below = tl.load(table + middle) <= program
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return table + rows + low.to(tl.int64) * (_TERM + 3 * terms), program - tl.load(table + low)


@triton.jit
def _pointer(row, COLUMN: tl.constexpr, dtype: tl.constexpr, EVEN: tl.constexpr):
    pointer = tl.load(row + COLUMN).to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 16) if EVEN else pointer


@triton.jit(do_not_specialize=["rows", "steps", "terms"])
def table_kernel(
    table,
    rows,
    steps,
    terms,
    levels,
    TERMS: tl.constexpr,
    KIND: tl.constexpr,
    SCALES: tl.constexpr,
    MASKED: tl.constexpr,
    DTYPE: tl.constexpr,
    BFLOAT16: tl.constexpr,
    DROPPED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one of many passes, which differ in their tensors, keys and numbers.

    Args:
        table: int64: the first program of each row; then the rows.
        rows: how many there are.
        steps: of a search for a row by bisection.
        terms: number of terms.
        levels: the table of quantiles for normal noise, or None for signs.
        TERMS: the same for a loop that is unrolled, in which a thread's elements share their words; 0 for one that
            is not, where each element hashes its own.
        KIND: `ADD`, `SIGN` or `MOMENTUM`.
        SCALES: `WEIGHTS`, `ABSOLUTE` or `RELATIVE`.
        MASKED: whether only magnitudes up to a limit move.
        DTYPE: of the weights in memory; bf16 as int16.
        BFLOAT16: whether these are bf16.
        DROPPED: random bits for stochastic rounding; 0 rounds to nearest even.
        EVEN: whether all addresses and counts are multiples of 16.
        BLOCK: elements of one program.
    """
    row, block = _row(table, rows, steps, terms, tl.program_id(0))
    start = block.to(tl.int64) * BLOCK
    count = tl.load(row + _COUNT)
    if EVEN:
        count = tl.multiple_of(count, 16)
    index = tl.arange(0, BLOCK)
    inside = index < count - start
    lane = index.to(tl.uint32)

    at = row + _TERM
    total = _term(start, lane, tl.load(at), tl.load(at + 1), tl.load(at + 2), levels)
    if TERMS:
        for _ in tl.static_range(1, TERMS):
            at += 3
            total += _term(start, lane, tl.load(at), tl.load(at + 1), tl.load(at + 2), levels)
    else:
        for term in range(1, terms):
            next = at + 3 * term
            total += _term(start, lane, tl.load(next), tl.load(next + 1), tl.load(next + 2), levels)

    before = _loaded(_pointer(row, _THETA, DTYPE, EVEN) + start + index, inside, BFLOAT16)
    if MASKED:
        moves = tl.abs(before) <= _number(tl.load(row + _LIMIT))
        total = tl.where(moves, total, 0.0)
    if KIND == _SIGN:
        total = ((total > 0.0).to(tl.float32) - (total < 0.0).to(tl.float32)) * _number(tl.load(row + _RATE))
    elif KIND == _MOMENTUM:
        state = _pointer(row, _STATE, tl.float32, EVEN) + start + index
        total = tl.load(state, mask=inside) * _number(tl.load(row + _BETA)) + total
        tl.store(state, total, mask=inside)
        total = total * _number(tl.load(row + _RATE))

    decay = _number(tl.load(row + _DECAY))
    if SCALES == _RELATIVE:
        value = ((decay.to(tl.float64) + total.to(tl.float64)) * before.to(tl.float64)).to(tl.float32)
    else:
        value = before * decay + total
    if SCALES != _WEIGHTS:
        floor = _number(tl.load(row + _FLOOR))
        least = tl.where(before > floor, floor, before)
        value = tl.where(value < least, least, value)
    if MASKED:
        value = tl.where(moves, value, before)
    rounding = row + _ROUNDING
    result = _rounded(value, start, lane, tl.load(rounding), tl.load(rounding + 1), DTYPE, BFLOAT16, DROPPED)
    tl.store(_pointer(row, _OUT, DTYPE, EVEN) + start + index, result, mask=inside)
