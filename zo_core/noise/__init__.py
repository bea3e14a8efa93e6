"""Noise as a pure function, and the arithmetic that moves weights along it."""

from .base import NOISES, Noise
from .direction import Direction, stacked_values
from .gaussian import Gaussian
from .hashing import derive_seed
from .low_rank import LowRank, LowRankDirection, direction_of, is_matrix, stacked_factors
from .rademacher import Rademacher

__all__ = [
    "NOISES",
    "Direction",
    "Gaussian",
    "LowRank",
    "LowRankDirection",
    "Noise",
    "Rademacher",
    "derive_seed",
    "direction_of",
    "is_matrix",
    "stacked_factors",
    "stacked_values",
]
