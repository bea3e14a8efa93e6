"""Estimators: from losses to probes."""

from .base import ESTIMATORS, Estimate, Estimator
from .fzoo import Fzoo
from .spsa import Spsa

__all__ = ["ESTIMATORS", "Estimate", "Estimator", "Fzoo", "Spsa"]
