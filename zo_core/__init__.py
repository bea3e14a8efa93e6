"""Zeroth-order (forward-only) training: the engine under `hf_zo` and `lightning_zo`.

It knows torch and nothing of any trainer.
"""

from .adapter import save_adapter
from .config import ZOConfig
from .engine import ZeroOrder
from .errors import ConfigError, LossError, ModelError, StateError, ZOError
from .estimators import ESTIMATORS, Estimator, Fzoo, Spsa
from .noise import NOISES, Gaussian, LowRank, Noise, Rademacher, derive_seed
from .noise.direction import Scaling
from .optimizer import ZOOptimizer
from .records import Point, Probe, StepRecord
from .rules import RULES, Momentum, Sgd, Sign, Torch, UpdateRule
from .targets import TARGETS, Int4Scales, Slot, Target, Trainable

__version__ = "0.1.0"

__all__ = [
    "ESTIMATORS",
    "NOISES",
    "RULES",
    "TARGETS",
    "ConfigError",
    "Estimator",
    "Fzoo",
    "Gaussian",
    "Int4Scales",
    "LossError",
    "LowRank",
    "ModelError",
    "Momentum",
    "Noise",
    "Point",
    "Probe",
    "Rademacher",
    "Scaling",
    "Sgd",
    "Sign",
    "Slot",
    "Spsa",
    "StateError",
    "StepRecord",
    "Target",
    "Torch",
    "Trainable",
    "UpdateRule",
    "ZOConfig",
    "ZOError",
    "ZOOptimizer",
    "ZeroOrder",
    "derive_seed",
    "save_adapter",
]
