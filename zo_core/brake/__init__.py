"""The brake: when the loss has risen (the statistic), and what a run keeps to go back (the state)."""

from .state import Braking, Done, rise
from .statistic import Alarm, Brake, in_float32

__all__ = ["Alarm", "Brake", "Braking", "Done", "in_float32", "rise"]
