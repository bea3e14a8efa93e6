"""Training models larger than the device, or than the memory, block by block."""

from .blocks import find_blocks
from .build import describe, offload
from .oracle import LockstepOracle
from .store import DiskStore
from .streaming import Block, Streaming
from .tensor_file import Piece, read_header

__all__ = [
    "Block",
    "DiskStore",
    "LockstepOracle",
    "Piece",
    "Streaming",
    "describe",
    "find_blocks",
    "offload",
    "read_header",
]
