"""The oracle: the only part that runs the model."""

from .functional import realisation
from .resident import ResidentOracle, as_scalar

__all__ = ["ResidentOracle", "as_scalar", "realisation"]
