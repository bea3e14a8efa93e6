"""Memory that noise takes on a CPU while a step runs."""

from __future__ import annotations

from collections.abc import Sequence

from zo_core.cache import ENTRY_BYTES
from zo_core.noise import Noise
from zo_core.noise.direction import CPU_CHUNK
from zo_core.noise.hashing import BATCH_WORDS, WORD_BYTES
from zo_core.noise.low_rank import LEFT_BYTES, RIGHT_BYTES
from zo_core.noise.rounding import DROPPED_BITS
from zo_core.targets import Slot


def noise_bytes(noise: Noise, slots: Sequence[Slot], directions: int, threads: int, streamed: bool) -> int:
    """What is kept of a step's directions, and the buffers in which they are made.

    Args:
        noise: of the run.
        slots: that move.
        directions: per step.
        threads: that run probes.
        streamed: updates of a step are applied in the next, so words of two steps are kept.
    """
    words = left = right = 0
    for slot in slots:
        shape = slot.tensor.shape
        rank = noise.rank_of(shape, slot.scaling)
        if rank is not None:
            left += 4 * rank * shape[0] + ENTRY_BYTES
            right += 4 * rank * shape[1:].numel() + ENTRY_BYTES
        else:
            count = noise.words_of(shape)
            words += 4 * count + -(-count // BATCH_WORDS) * ENTRY_BYTES
    words *= 1 + streamed
    kept = [(words, WORD_BYTES), (left, LEFT_BYTES), (right, RIGHT_BYTES)]
    half = any(slot.tensor.dtype in DROPPED_BITS for slot in slots)
    largest = max((slot.tensor.numel() for slot in slots), default=0)
    buffer = 4 * min(CPU_CHUNK, largest)
    buffers = threads * (1 + (directions > 1) + half)
    return sum(min(directions * size, bound) for size, bound in kept) + buffers * buffer
