"""Estimators: from losses to probes."""

from .base import ESTIMATORS, Estimate, Estimator
from .conservative import Conservative
from .es import Es
from .forward_grad import ForwardGrad
from .fzoo import Fzoo
from .spsa import Spsa

__all__ = ["ESTIMATORS", "Conservative", "Es", "Estimate", "Estimator", "ForwardGrad", "Fzoo", "Spsa"]
