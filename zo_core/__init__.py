"""Zeroth-order (forward-only) training: the engine under `hf_zo` and `lightning_zo`.

It knows torch and nothing of any trainer.
"""

from .adapter import save_adapter
from .config import ZOConfig
from .engine import ZeroOrder
from .errors import ConfigError, LossError, ModelError, QueryError, RanksError, SearchError, StateError, ZOError
from .estimators import ESTIMATORS, Conservative, Es, Estimate, Estimator, ForwardGrad, Fzoo, Spsa
from .gradient_check import GradientCheck
from .learning_rate import LrSuggestion, Trial
from .noise import (
    NOISES,
    Coordinates,
    ElementNoise,
    Gaussian,
    LowRank,
    Noise,
    OneBlock,
    Rademacher,
    Sampled,
    Sparse,
    derive_seed,
)
from .noise.direction import Scaling
from .optimizer import ZOOptimizer
from .queries import retrying
from .records import Point, Probe, Scores, StepRecord
from .rules import RULES, Momentum, Sgd, Sign, Torch, UpdateRule
from .seedlog import SeedLog, SeedLogWriter, replay
from .suggest import suggest_lr
from .summary import Summary
from .targets import TARGETS, Int4Scales, Scales, Slot, Target, TorchaoScales, Trainable
from .version import __version__

__all__ = [
    "ESTIMATORS",
    "NOISES",
    "RULES",
    "TARGETS",
    "ConfigError",
    "Conservative",
    "Coordinates",
    "ElementNoise",
    "Es",
    "Estimate",
    "Estimator",
    "ForwardGrad",
    "Fzoo",
    "Gaussian",
    "GradientCheck",
    "Int4Scales",
    "LossError",
    "LowRank",
    "LrSuggestion",
    "ModelError",
    "Momentum",
    "Noise",
    "OneBlock",
    "Point",
    "Probe",
    "QueryError",
    "Rademacher",
    "RanksError",
    "Sampled",
    "Scales",
    "Scaling",
    "Scores",
    "SearchError",
    "SeedLog",
    "SeedLogWriter",
    "Sgd",
    "Sign",
    "Slot",
    "Sparse",
    "Spsa",
    "StateError",
    "StepRecord",
    "Summary",
    "Target",
    "Torch",
    "TorchaoScales",
    "Trainable",
    "Trial",
    "UpdateRule",
    "ZOConfig",
    "ZOError",
    "ZOOptimizer",
    "ZeroOrder",
    "__version__",
    "derive_seed",
    "replay",
    "retrying",
    "save_adapter",
    "suggest_lr",
]
