"""What may move. A target names the tensors of a model that training changes, as slots."""

from .auto import Auto
from .base import TARGETS, WRAPPERS, Slot, Target, check_tensor, memory_of, slot_keys
from .int4 import Int4Scales, keep_codes_plain
from .trainable import Trainable

__all__ = [
    "TARGETS",
    "WRAPPERS",
    "Auto",
    "Int4Scales",
    "Slot",
    "Target",
    "Trainable",
    "check_tensor",
    "keep_codes_plain",
    "memory_of",
    "slot_keys",
]
