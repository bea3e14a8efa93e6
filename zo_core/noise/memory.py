"""Memory that noise needs on a CPU while a step runs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..cache import ENTRY_BYTES
from .base import Noise
from .direction import CPU_CHUNK, Scaling
from .hashing import BATCH_WORDS, WORD_BYTES
from .low_rank import LEFT_BYTES, RIGHT_BYTES
from .rounding import DROPPED_BITS


def noise_bytes(
    noise: Noise,
    moving: Sequence[tuple[Tensor, Scaling | None]],
    directions: int,
    threads: int,
    *,
    streamed: bool,
) -> int:
    """Bytes that are kept of a step's directions, and of the buffers in which they are computed.

    Args:
        noise: the noise of the run.
        moving: the tensors that move, each with its `Scaling`, or None.
        directions: number of directions per step.
        threads: number of threads that run probes.
        streamed: updates of a step are applied in the next one, so words of two steps are kept.
    """
    words = left = right = 0
    for tensor, scaling in moving:
        shape = tensor.shape
        rank = noise.rank_of(shape, scaling)
        if rank is not None:
            left += 4 * rank * shape[0] + ENTRY_BYTES
            right += 4 * rank * shape[1:].numel() + ENTRY_BYTES
        else:
            count = noise.words_of(shape)
            words += 4 * count + -(-count // BATCH_WORDS) * ENTRY_BYTES
    words *= 1 + streamed
    kept = [(words, WORD_BYTES), (left, LEFT_BYTES), (right, RIGHT_BYTES)]
    half = any(tensor.dtype in DROPPED_BITS for tensor, _ in moving)
    largest = max((tensor.numel() for tensor, _ in moving), default=0)
    buffer = 4 * min(CPU_CHUNK, largest)
    buffers = threads * (1 + (directions > 1) + half)
    return sum(min(directions * size, bound) for size, bound in kept) + buffers * buffer
