"""The passes of `direction` in Triton kernels: one pass over the weights, and one launch for all that are alike.

A single addition travels with its launch. Everything else (rules, scales, masks, several terms, many tensors) is a
row of a table, which a kernel fetches out of page-locked memory.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..dispatch import declare, watchers
from .changes import ADDITION, Change, Pass, flat_target
from .direction import Direction, float32
from .gaussian import Gaussian, table
from .hashing import sent
from .mailbox import HALF, mailbox
from .rademacher import Rademacher, float_bits
from .rounding import DROPPED_BITS
from .triton_kernels import (
    ABSOLUTE,
    ADD,
    BLOCK,
    MOMENTUM,
    RELATIVE,
    SIGN,
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
    groups: dict[Variant, list[Work]] = {}
    for one in passes:
        if one.theta.numel():
            # A kernel counts in elements from the first address, so what has gaps is copied.
            target = one.out if one.out.is_contiguous() else flat_target(one.theta, one.out)
            work = Work(one, one.theta.contiguous(), target)
            groups.setdefault(_variant(work), []).append(work)
    for variant, group in groups.items():
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


def try_out(device: torch.device) -> None:
    """Compiles a kernel and runs it; raises whatever prevents that."""
    zeros = torch.zeros(32, device=device)
    work = Work(Pass(zeros, Direction(Rademacher(), "trial", ((0, 1.0),)), Change(), zeros), zeros, zeros)
    _launch(_variant(work), [work])


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'without a message').splitlines()[0]}"


def _variant(work: Work) -> Variant:
    direction: Direction
    theta, direction, change, _ = work.done
    dtype, scaling = theta.dtype, direction.scaling
    addresses = work.source.data_ptr() | work.target.data_ptr()
    if change.momentum is not None:
        addresses |= change.momentum.data_ptr()
    return Variant(
        theta.device,
        dtype,
        isinstance(direction.noise, Gaussian),
        len(direction.terms),
        KINDS[change.kind],
        WEIGHTS if scaling is None else RELATIVE if scaling.relative else ABSOLUTE,
        direction.limit(theta) != float("inf"),
        0 if direction.rounding_key(dtype) is None else DROPPED_BITS[dtype],
        (work.source.numel() | addresses) % 16 == 0,
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
    firsts, programs = [], 0
    for work in group:
        firsts.append(programs)
        programs += -(-work.source.numel() // BLOCK)
    values = _on_device(firsts + [value for work in group for value in _row(work)], variant.device)
    table_kernel[(programs,)](
        values,
        len(group),
        (len(group) - 1).bit_length(),
        variant.terms,
        TERMS=variant.terms if variant.terms <= MAX_UNROLLED else 0,
        KIND=variant.kind,
        SCALES=variant.scales,
        MASKED=variant.masked,
        DTYPE=IN_MEMORY[variant.dtype],
        EVEN=variant.even,
        **_common(variant),
    )


def _on_device(numbers: list[int], device: torch.device) -> Tensor:
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


def _row(work: Work) -> list[int]:
    """A row of the table; see the columns of `triton_kernels`."""
    direction: Direction
    theta, direction, change, _ = work.done
    row = [
        work.source.data_ptr(),
        work.target.data_ptr(),
        0 if change.momentum is None else change.momentum.data_ptr(),
        work.source.numel(),
        *(_ADDITION if change is ADDITION else _numbers(change)),
        float_bits(direction.limit(theta)),
        0 if direction.scaling is None else float_bits(float32(direction.scaling.floor)),
        *(direction.rounding_key(theta.dtype) or (0, 0)),
    ]
    for key, c in direction.keys():  # noqa: SIM118 (no dictionary)
        row += [*key, float_bits(c)]
    return row
