"""Noise as a pure function, and the arithmetic that moves weights along it."""

from .alternatives import Alternatives, stacked_values
from .base import NOISES, ElementNoise, Noise
from .coordinates import Coordinates
from .direction import Direction, Passes, Terms, compute_dtype
from .gaussian import Gaussian
from .hashing import derive_seed
from .low_rank import FactorDirection, LowRank, LowRankDirection, stacked_factors
from .memory import noise_bytes
from .one_block import OneBlock
from .rademacher import Rademacher
from .sampled import Sampled
from .sparse import Sparse

__all__ = [
    "NOISES",
    "Alternatives",
    "Coordinates",
    "Direction",
    "ElementNoise",
    "FactorDirection",
    "Gaussian",
    "LowRank",
    "LowRankDirection",
    "Noise",
    "OneBlock",
    "Passes",
    "Rademacher",
    "Sampled",
    "Sparse",
    "Terms",
    "compute_dtype",
    "derive_seed",
    "noise_bytes",
    "stacked_factors",
    "stacked_values",
]
