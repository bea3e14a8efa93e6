"""Where slots are stored, and how each of them is written."""

from .base import AtOnce, ByTorchOptimizer, Updater
from .places import Places, State, Work
from .updaters import Move, Updaters, changes_often
from .window import Window
from .windows import Windows

__all__ = [
    "AtOnce",
    "ByTorchOptimizer",
    "Move",
    "Places",
    "State",
    "Updater",
    "Updaters",
    "Window",
    "Windows",
    "Work",
    "changes_often",
]
