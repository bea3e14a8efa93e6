"""The oracle: the only part that runs the model."""

from .function_mode import upcast
from .functional import realisation
from .materialise import Materialised, is_compiled
from .resident import ResidentOracle, as_scalar
from .reuse import measured_again
from .scratch import ScratchPool
from .stacked import each_copy
from .stacked_oracle import StackedOracle, difference

__all__ = [
    "Materialised",
    "ResidentOracle",
    "ScratchPool",
    "StackedOracle",
    "as_scalar",
    "difference",
    "each_copy",
    "is_compiled",
    "measured_again",
    "realisation",
    "upcast",
]
