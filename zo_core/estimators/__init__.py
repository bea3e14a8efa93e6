"""Estimators: from losses to probes."""

from .base import ESTIMATORS, Estimate, Estimator
from .conservative import Conservative
from .fzoo import Fzoo
from .spsa import Spsa

__all__ = ["ESTIMATORS", "Conservative", "Estimate", "Estimator", "Fzoo", "Spsa"]
