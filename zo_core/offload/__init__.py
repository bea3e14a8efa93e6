"""Training models larger than the device, or than the memory, block by block."""

from .blocks import find_blocks
from .build import describe, move_streamed, offload
from .oracle import Carried, LockstepOracle
from .store import DiskStore
from .streaming import Block, Streaming
from .tensor_file import Piece, read_header

__all__ = [
    "Block",
    "Carried",
    "DiskStore",
    "LockstepOracle",
    "Piece",
    "Streaming",
    "describe",
    "find_blocks",
    "move_streamed",
    "offload",
    "read_header",
]
