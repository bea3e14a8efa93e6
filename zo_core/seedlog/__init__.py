"""Seed logs: a small file records a whole fine-tune, and replays it bit for bit."""

from .adapter import ADAPTER_FILES, load_adapter, save_adapter
from .fingerprint import fingerprint
from .format import LoggedStep, Settings
from .log import FILE_NAME, SeedLog
from .replay import engine_for, replay
from .run import RunLog, Start, can_log
from .stopped import Stopped
from .writer import SeedLogWriter

__all__ = [
    "ADAPTER_FILES",
    "FILE_NAME",
    "LoggedStep",
    "RunLog",
    "SeedLog",
    "SeedLogWriter",
    "Settings",
    "Start",
    "Stopped",
    "can_log",
    "engine_for",
    "fingerprint",
    "load_adapter",
    "replay",
    "save_adapter",
]
