"""Which kind of direction a slot has, by the noise and the slot's shape."""

from __future__ import annotations

from collections.abc import MutableMapping

import torch

from .base import Noise
from .direction import Direction, Scaling
from .low_rank import LowRankDirection, is_matrix
from .sampled import Sampled
from .sparse import Sparse, SparseDirection


def direction_of(
    noise: Noise,
    slot: str,
    shape: torch.Size,
    terms: tuple[tuple[int, float], ...],
    rounding_seed: int | None = None,
    backend: str = "eager",
    scaling: Scaling | None = None,
    thresholds: MutableMapping[str, float] | None = None,
) -> Direction:
    """The `Direction` of a slot of this shape; it has no terms where the slot's block is not drawn.

    Args:
        noise: of the seeds in ``terms``.
        slot: key of the slot.
        shape: of the slot.
        terms: pairs ``(seed, c)``.
        rounding_seed: as in `Direction`.
        backend: as in `Direction`.
        scaling: as in `Direction`.
        thresholds: of a run with masks, by slot; filled as slots come by.
    """
    if isinstance(noise, Sampled):
        terms, noise = noise.drawn(slot, terms), noise.wrapped
    if isinstance(noise, Sparse):
        known = {} if thresholds is None else thresholds
        how = noise.wrapped, slot, terms, rounding_seed, "eager", scaling
        return SparseDirection(*how, quantile=noise.quantile, thresholds=known)
    if is_matrix(noise, shape, scaling):
        return LowRankDirection(noise, slot, terms, rounding_seed, shape=shape)
    return Direction(noise, slot, terms, rounding_seed, backend, scaling)
