"""Noise as a pure function, and the arithmetic that moves weights along it."""

from .base import NOISES, Noise
from .direction import Direction, stacked_values
from .gaussian import Gaussian
from .hashing import derive_seed
from .low_rank import FactorDirection, LowRank, LowRankDirection, is_matrix, stacked_factors
from .of_slot import direction_of
from .rademacher import Rademacher
from .sampled import Sampled, share_of, unsampled
from .sparse import Sparse

__all__ = [
    "NOISES",
    "Direction",
    "FactorDirection",
    "Gaussian",
    "LowRank",
    "LowRankDirection",
    "Noise",
    "Rademacher",
    "Sampled",
    "Sparse",
    "derive_seed",
    "direction_of",
    "is_matrix",
    "share_of",
    "stacked_factors",
    "stacked_values",
    "unsampled",
]
