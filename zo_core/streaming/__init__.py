"""Training models larger than the device, or than the memory, block by block."""

from .blocks import find_blocks, repeated_layers
from .build import beyond, describe, move_streamed, offload, plan_blocks, resident_bytes
from .oracle import TRIM_BYTES, LockstepOracle
from .shared import share
from .store import DiskStore, own_folder
from .streaming import Block, Streaming, arena_slots
from .tensor_file import Piece, read_header

__all__ = [
    "TRIM_BYTES",
    "Block",
    "DiskStore",
    "LockstepOracle",
    "Piece",
    "Streaming",
    "arena_slots",
    "beyond",
    "describe",
    "find_blocks",
    "move_streamed",
    "offload",
    "own_folder",
    "plan_blocks",
    "read_header",
    "repeated_layers",
    "resident_bytes",
    "share",
]
