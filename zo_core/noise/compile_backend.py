"""The arithmetic of `direction`, fused into one pass over the weights by torch.compile.

The words come from the same eager hash; what is fused is everything that touches each element. The
first call for a dtype, a noise and a number of terms compiles for about 10 seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from types import FunctionType

import torch
from torch import Tensor

from .changes import Pass, flat, flat_target
from .direction import Direction
from .gaussian import LEVELS, Gaussian, table
from .hashing import BATCH_WORDS, sent, words
from .rademacher import SIGN_BIT, Rademacher, float_bits
from .rounding import DROPPED_BITS


def supports(one: Pass) -> bool:
    """Whether there is a fused form that is faster: for signs on 16-bit weights it was measured to be slower."""
    direction: Direction
    theta, direction, change, _ = one
    kind, dtype = type(direction.noise), theta.dtype
    return (
        (kind is Gaussian or (kind is Rademacher and dtype not in DROPPED_BITS))
        and dtype != torch.float64
        and direction.rounding_key(dtype) is None
        and change.kind == "add"
        and direction.scaling is None
        and direction.limit(theta) == math.inf
    )


def _fused(
    theta: Tensor,
    out: Tensor | None,
    bits: list[Tensor],
    coefficients: Tensor,
    decay: Tensor,
    levels: Tensor | None,
) -> None:
    out = theta if out is None else out
    count = theta.shape[0]
    total = None
    for term in range(len(bits)):
        if levels is None:
            shifts = 31 - torch.arange(32, dtype=torch.int32, device=theta.device)
            signs = (bits[term].unsqueeze(1) << shifts) & SIGN_BIT
            values = (signs ^ coefficients[term]).view(torch.float32).view(-1)
        else:
            index = bits[term].view(torch.int16).to(torch.int32) & (LEVELS - 1)
            values = levels[index] * coefficients[term].view(torch.float32)
        total = values if total is None else total + values
    assert total is not None
    out.copy_(theta.to(torch.float32) * decay + total[:count])


@lru_cache(maxsize=64)
def _compiled(variant: tuple[object, ...]) -> Callable[..., None]:
    # torch.compile bounds the recompilations per code object, so every variant gets one of its own.
    function = FunctionType(_fused.__code__.replace(), _fused.__globals__, "_fused")
    return torch.compile(function, dynamic=True, fullgraph=True)


def run(passes: Sequence[Pass]) -> None:
    """Does passes that are supported, with the bits of the eager ones."""
    for theta, direction, change, out in passes:
        _add(direction, theta, change.decay, out)


def _add(direction: Direction, theta: Tensor, decay: float, out: Tensor) -> None:
    noise, device = direction.noise, theta.device
    levels = table(device) if isinstance(noise, Gaussian) else None
    keys = direction.keys()
    source, target = flat(theta), flat_target(theta, out)
    coefficients = sent([float_bits(c) for _, c in keys], device, torch.int32)
    scale = sent(decay, device, torch.float32)
    in_place = target.data_ptr() == source.data_ptr()
    fused = _compiled((theta.dtype, device, len(keys), levels is None, in_place))
    span = BATCH_WORDS * noise.values_per_word
    for start in range(0, source.numel(), span):
        piece = slice(start, min(start + span, source.numel()))
        count = -(-(piece.stop - start) // noise.values_per_word)
        bits = [words(key, start // noise.values_per_word, count, device) for key, _ in keys]
        fused(source[piece], None if in_place else target[piece], bits, coefficients, scale, levels)
    if target.data_ptr() != out.data_ptr():
        out.copy_(target.view(out.shape))
