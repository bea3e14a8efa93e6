"""What training may change: a target returns these tensors of a model as slots."""

from .auto import Auto, has_adapters
from .base import (
    TARGETS,
    WRAPPERS,
    Slot,
    Target,
    by_number,
    check_tensor,
    memory_of,
    plain_parameters,
    plain_tensors,
    shapes_of,
    slot_keys,
)
from .dispatched import check_values, elsewhere
from .int4 import Int4Scales, check_dequantised, keep_codes_plain, move_scales
from .memory import as_it_lies, in_several_ways
from .scales import Scales
from .sharded import check_settings, check_whole, group_of, held, held_part, parts_of
from .torchao import TorchaoScales
from .trainable import Trainable

__all__ = [
    "TARGETS",
    "WRAPPERS",
    "Auto",
    "Int4Scales",
    "Scales",
    "Slot",
    "Target",
    "TorchaoScales",
    "Trainable",
    "as_it_lies",
    "by_number",
    "check_dequantised",
    "check_settings",
    "check_tensor",
    "check_values",
    "check_whole",
    "elsewhere",
    "group_of",
    "has_adapters",
    "held",
    "held_part",
    "in_several_ways",
    "keep_codes_plain",
    "memory_of",
    "move_scales",
    "parts_of",
    "plain_parameters",
    "plain_tensors",
    "shapes_of",
    "slot_keys",
]
