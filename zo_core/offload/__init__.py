"""Training models larger than the device, or than the memory, block by block."""

from .build import offload
from .oracle import LockstepOracle
from .streaming import Streaming

__all__ = ["LockstepOracle", "Streaming", "offload"]
