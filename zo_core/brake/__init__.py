"""Has the loss risen (the statistic), are steps too long (trust), what is kept to go back (the state)."""

from .state import SHRUNK, SHRUNK_16, Braking, Done
from .statistic import Alarm, Brake, in_float32

__all__ = ["SHRUNK", "SHRUNK_16", "Alarm", "Brake", "Braking", "Done", "in_float32"]
