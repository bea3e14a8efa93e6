"""Finding a learning rate: the range test, its trials, the snapshot that undoes them, advice on a given rate."""

from .advice import advise
from .search import LrSuggestion, base_rates, check_replaceable, range_test, set_lr
from .snapshot import Snapshot
from .trials import Trial

__all__ = [
    "LrSuggestion",
    "Snapshot",
    "Trial",
    "advise",
    "base_rates",
    "check_replaceable",
    "range_test",
    "set_lr",
]
