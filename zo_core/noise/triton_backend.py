"""The passes of `direction` in Triton kernels: one pass over the weights, and one launch for all that are alike.

A single addition travels with its launch. Everything else (rules, scales, masks, several terms, many tensors) is a
row of a table, which a kernel fetches out of page-locked memory.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import lru_cache, partial, reduce
from itertools import accumulate
from operator import or_
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from ..cache import kept_for_a_step
from ..dispatch import declare, watchers
from .changes import ADDITION, Change, Pass, flat_target
from .direction import Direction, float32
from .gaussian import Gaussian, table
from .hashing import DIRECTION, sent, stream_key
from .mailbox import HALF, mailbox
from .rademacher import Rademacher, float_bits
from .rounding import DROPPED_BITS
from .triton_kernels import (
    ABSOLUTE,
    ADD,
    BETA,
    BLOCK,
    COUNT,
    DECAY,
    LIMIT,
    MOMENTUM,
    OUT,
    RELATIVE,
    SIGN,
    TERM,
    THETA,
    WEIGHTS,
    add_kernel,
    fetch_kernel,
    table_kernel,
)

logger = logging.getLogger(__name__)

#: Terms up to this number are unrolled, at the price of 3 to 6 s of compilation for 32; more are looped over, where a
#: term takes about seven times as many instructions.
MAX_UNROLLED = 32

KINDS = {"add": ADD, "sign": SIGN, "momentum": MOMENTUM}

#: In memory, by type of the weights. Triton converts bf16 by instructions that older devices lack.
IN_MEMORY = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.int16}

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False, "sanitize_overflow": False}


class Variant(NamedTuple):
    """What passes have in common that one launch can do, and for which a kernel is compiled."""

    device: torch.device
    dtype: torch.dtype
    gaussian: bool
    terms: int
    kind: int
    scales: int
    masked: bool
    dropped: int
    even: bool


class Work(NamedTuple):
    """A pass with contiguous tensors; the result goes to ``target``, a buffer if ``out`` is not contiguous."""

    done: Pass
    source: Tensor
    target: Tensor


#: Variants that could not be compiled here.
_failed: set[Variant] = set()


def supports(one: Pass) -> bool:
    """Whether there is a fused form: not for float64 weights, pieces of slots, or user-defined noises."""
    return (
        type(one.direction.noise) in (Rademacher, Gaussian)
        and one.theta.dtype in IN_MEMORY
        and one.direction.offset is None
    )


def run(passes: Sequence[Pass]) -> None:
    """Does passes that are supported, with the bits of the eager ones, on the current stream of their device.

    It does not wait for the device. What cannot be compiled is done eagerly, and one line of log says so.

    Args:
        passes: none of them writes what another one reads or writes; ``theta`` is ``out``, or shares no memory with
            it. Weights may have any shape and strides. (They are on the CPU under ``TRITON_INTERPRET=1``.)
    """
    for variant, group in _alike(passes).items():
        try:
            if _failed and variant in _failed:
                raise RuntimeError
            _launch(variant, group)
        except Exception as error:
            if variant not in _failed:
                _failed.add(variant)
                logger.warning(
                    "the Triton kernel %s failed (%s); eager torch computes the same bits in its place, in more time",
                    *(variant, _first_line(error)),
                )
            for work in group:
                work.done.direction.apply_eager(work.done.theta, work.done.change, work.done.out)
            continue
        for work in group:
            if work.target is not work.done.out:
                work.done.out.copy_(work.target.view(work.done.out.shape))


def add_alike(directions: Sequence[Direction], sources: Sequence[Tensor], targets: Sequence[Tensor]) -> bool:
    """``target = round(source + s)`` in one launch, for the weights of a layer along one term.

    The bits are those of `run`, which takes Python several times as long: here tensors are only looked at, and what is
    the same at every step, or for both probes of a direction, is at hand.

    Args:
        directions: of each tensor.
        sources: weights, none of which shares memory with another one, or with a target.
        targets: of the same shapes.

    Returns:
        Whether it was done. It was not if the tensors are of several kinds or not contiguous, or if their places are
        not multiples of 16.
    """
    first, dtype, device = directions[0], sources[0].dtype, sources[0].device
    noise, terms = first.noise, first.terms
    if type(first) is not Direction or len(terms) != 1 or not supports(Pass(sources[0], first, ADDITION, targets[0])):
        return False
    for direction, source, target in zip(directions, sources, targets, strict=True):
        one = direction.noise is noise and direction.terms == terms and type(direction) is Direction
        odd = direction.scaling or direction.part or direction.rounding_seed is not None or direction.offset is not None
        if not one or odd or source.dtype != dtype or source.device != device:
            return False
        if not (source.is_contiguous() and target.is_contiguous()):  # a model may get another memory format at any time
            return False
    here, there = [source.data_ptr() for source in sources], [target.data_ptr() for target in targets]
    counts = tuple([source.numel() for source in sources])
    if reduce(or_, (*here, *there, *counts)) % 16 or not all(counts):
        return False
    variant = Variant(device, dtype, type(noise) is Gaussian, 1, ADD, WEIGHTS, False, 0, True)
    if variant in _failed:
        return False
    ((seed, c),) = terms
    firsts, empty, programs = _additions(counts)
    rows = empty.copy()
    rows[:, THETA], rows[:, OUT] = here, there
    rows[:, TERM : TERM + 2] = _keys(seed, tuple([direction.slot for direction in directions]))
    rows[:, TERM + 2] = float_bits(float32(c))
    declare(sources, targets)
    try:
        with torch.cuda.device_of(sources[0]):
            _launch_rows(variant, np.concatenate((firsts, rows.reshape(-1))), len(counts), programs)
    except Exception:
        return False  # `run` fails, too, says so, and does it eagerly
    return True


@lru_cache(maxsize=256)
def _additions(counts: tuple[int, ...]) -> tuple[Any, Any, int]:
    """For tensors of these sizes, the first program of each, their rows without places and terms, and all programs."""
    programs = [-(-count // BLOCK) for count in counts]
    rows = np.zeros((len(counts), TERM + 3), np.int64)
    rows[:, COUNT] = counts
    rows[:, DECAY : BETA + 1] = _ADDITION
    rows[:, LIMIT] = _NO_LIMIT
    return np.array([0, *accumulate(programs[:-1])], np.int64), rows, sum(programs)


@kept_for_a_step
def _keys(seed: int, slots: tuple[str, ...]) -> Any:
    """The keys of several slots in a direction, ``[len(slots), 2]``."""
    return np.array([stream_key(seed, slot, DIRECTION) for slot in slots], np.int64)


def try_out(device: torch.device) -> None:
    """Compiles a kernel and runs it; raises whatever prevents that."""
    zeros = torch.zeros(32, device=device)
    trial = Pass(zeros, Direction(Rademacher(), "trial", ((0, 1.0),)), Change(), zeros)
    for variant, group in _alike([trial]).items():
        _launch(variant, group)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'without a message').splitlines()[0]}"


def _alike(passes: Sequence[Pass]) -> dict[Variant, list[Work]]:
    """The passes, by the kernel that does them."""
    groups: dict[Variant, list[Work]] = {}
    known: dict[tuple[Any, ...], list[Work]] = {}
    for one in passes:
        theta, direction, change, out = one
        count = theta.numel()
        if not count:
            continue
        # A kernel counts in elements from the first address, so what has gaps is copied.
        source, target = theta.contiguous(), out if out.is_contiguous() else flat_target(theta, out)
        numbers = count | source.data_ptr() | target.data_ptr()
        if change.momentum is not None:
            numbers |= change.momentum.data_ptr()
        work, even = Work(one, source, target), numbers % 16 == 0
        if type(direction) is not Direction:
            groups.setdefault(_variant(work, even), []).append(work)
            continue
        # What a variant depends on and is at hand: to make one takes several times as long, and most are the same.
        scaling, rounds, terms = direction.scaling, direction.rounding_seed is not None, len(direction.terms)
        like = theta.get_device(), theta.dtype, type(direction.noise), terms, change.kind, id(scaling), rounds, even
        group = known.get(like)
        if group is None:
            group = known[like] = groups.setdefault(_variant(work, even), [])
        group.append(work)
    return groups


def _variant(work: Work, even: bool) -> Variant:
    direction: Direction
    theta, direction, change, _ = work.done
    dtype, scaling = theta.dtype, direction.scaling
    return Variant(
        theta.device,
        dtype,
        isinstance(direction.noise, Gaussian),
        len(direction.terms),
        KINDS[change.kind],
        WEIGHTS if scaling is None else RELATIVE if scaling.relative else ABSOLUTE,
        direction.limit(theta) != float("inf"),
        0 if direction.rounding_key(dtype) is None else DROPPED_BITS[dtype],
        even,
    )


def _launch(variant: Variant, group: Sequence[Work]) -> None:
    if watchers():
        written = [t for work in group for t in (work.target, work.done.change.momentum) if t is not None]
        declare([work.source for work in group], written)
    with torch.cuda.device_of(group[0].source):
        simple = variant.terms == 1 and variant.kind == ADD and variant.scales == WEIGHTS and not variant.masked
        if simple and len(group) == 1:
            _launch_one(variant, group[0])
        else:
            _launch_table(variant, group)


def _common(variant: Variant) -> dict[str, Any]:
    return {
        "levels": table(variant.device) if variant.gaussian else None,
        "BFLOAT16": variant.dtype == torch.bfloat16,
        "DROPPED": variant.dropped,
        "BLOCK": BLOCK,
        **OPTIONS,
    }


def _launch_one(variant: Variant, work: Work) -> None:
    direction: Direction = work.done.direction
    count = work.source.numel()
    ((key, c),) = direction.keys()
    rounding = direction.rounding_key(variant.dtype) or (0, 0)
    raw = variant.dtype == torch.bfloat16
    add_kernel[(-(-count // BLOCK),)](
        work.source.view(torch.int16) if raw else work.source,
        work.target.view(torch.int16) if raw else work.target,
        key0=key[0],
        key1=key[1],
        coefficient=float_bits(c),
        decay=float_bits(work.done.change.decay),
        rounding0=rounding[0],
        rounding1=rounding[1],
        count=count,
        **_common(variant),
    )


def _launch_table(variant: Variant, group: Sequence[Work]) -> None:
    firsts, rows, programs = [], list[int](), 0
    bits: dict[float, int] = {}
    for work in group:
        count = work.source.numel()
        firsts.append(programs)
        programs += -(-count // BLOCK)
        rows += _row(work, count, bits)
    _launch_rows(variant, firsts + rows, len(group), programs)


def _launch_rows(variant: Variant, numbers: Any, count: int, programs: int) -> None:
    """Launches the kernel of a table: the first program of each of ``count`` rows, and then the rows."""
    table_kernel[(programs,)](
        _on_device(numbers, variant.device),
        count,
        (count - 1).bit_length(),
        variant.terms,
        TERMS=variant.terms if variant.terms <= MAX_UNROLLED else 0,
        KIND=variant.kind,
        SCALES=variant.scales,
        MASKED=variant.masked,
        DTYPE=IN_MEMORY[variant.dtype],
        EVEN=variant.even,
        **_common(variant),
    )


def _on_device(numbers: Any, device: torch.device) -> Tensor:
    """The numbers as int64, without the copy engine, unless they are very many."""
    if device.type != "cuda" or len(numbers) > HALF:
        return sent(numbers, device, torch.int64)
    with torch.inference_mode(False):
        values = torch.empty(len(numbers), dtype=torch.int64, device=device)
    mailbox(device).put(numbers, partial(_fetch, values))
    return values


def _fetch(values: Tensor, address: int) -> None:
    count = len(values)
    fetch_kernel[(-(-count // BLOCK),)](address, values, count, BLOCK=BLOCK, num_warps=4)


def _numbers(change: Change) -> tuple[int, int, int]:
    return float_bits(change.decay), float_bits(change.rate), float_bits(change.beta)


_ADDITION = _numbers(ADDITION)
_NO_LIMIT, _NO_ROUNDING = float_bits(math.inf), (0, 0)


def _row(work: Work, count: int, bits: dict[float, int]) -> list[int]:
    """A row of the table; see the columns of `triton_kernels`. ``bits`` keeps those of coefficients."""
    direction: Direction
    theta, direction, change, _ = work.done
    momentum, scaling = change.momentum, direction.scaling
    row = [work.source.data_ptr(), work.target.data_ptr(), 0 if momentum is None else momentum.data_ptr(), count]
    row += _ADDITION if change is ADDITION else _numbers(change)
    row.append(_NO_LIMIT if type(direction) is Direction else float_bits(direction.limit(theta)))
    row.append(0 if scaling is None else float_bits(float32(scaling.floor)))
    row += direction.rounding_key(theta.dtype) or _NO_ROUNDING
    slot = direction.slot
    for seed, c in direction.terms:
        row += stream_key(seed, slot, DIRECTION)
        found = bits.get(c)
        if found is None:
            found = float_bits(float32(c))
            if c:  # 0.0 and -0.0 are one key
                bits[c] = found
        row.append(found)
    return row
