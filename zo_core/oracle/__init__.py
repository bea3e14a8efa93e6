"""The oracle: the only part that runs the model."""

from .functional import realisation
from .resident import ResidentOracle, as_scalar
from .stacked_oracle import StackedOracle, difference

__all__ = ["ResidentOracle", "StackedOracle", "as_scalar", "difference", "realisation"]
