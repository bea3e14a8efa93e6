"""Update rules: from probes to weights."""

from .base import ANCHOR, RULES, RuleMove, UpdateRule
from .momentum import Momentum
from .sgd import Sgd
from .sign import Sign
from .torch_rule import Torch

__all__ = ["ANCHOR", "RULES", "Momentum", "RuleMove", "Sgd", "Sign", "Torch", "UpdateRule"]
