"""Training models larger than the device, or than the memory, block by block."""

from .blocks import find_blocks, repeated_layers
from .build import beyond, describe, move_streamed, offload, plan_blocks, resident_bytes
from .lockstep import ambient
from .oracle import TRIM_BYTES, LockstepOracle
from .store import DiskStore
from .streaming import ARENA_SLOTS, Block, Streaming
from .tensor_file import Piece, read_header

__all__ = [
    "ARENA_SLOTS",
    "TRIM_BYTES",
    "Block",
    "DiskStore",
    "LockstepOracle",
    "Piece",
    "Streaming",
    "ambient",
    "beyond",
    "describe",
    "find_blocks",
    "move_streamed",
    "offload",
    "plan_blocks",
    "read_header",
    "repeated_layers",
    "resident_bytes",
]
