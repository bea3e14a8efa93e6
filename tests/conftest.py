"""What all tests share."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import random
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings

from zo_core.cache import clear_caches
from zo_core.ranks import LOGGERS

# Examples are the same in every run, so that a failure is a change of the code; nothing depends on the clock.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """With ``-n``, a process gets tests that stand together, so it makes what they share once; idle ones steal."""
    if config.getoption("numprocesses", None) and config.getoption("dist") == "no":
        config.option.dist = "worksteal"


def pytest_collection_finish() -> None:
    """What was imported is never garbage, and looking through it takes a third of a second each time."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)


@pytest.fixture(autouse=True, scope="session")
def no_waiting_for_the_disk() -> Iterator[None]:
    """Only after the machine has lost its power could a test see whether the disk had a file by then."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: os.fstat(file if isinstance(file, int) else file.fileno()) and None)
        yield


@pytest.fixture(autouse=True)
def known_start() -> Iterator[None]:
    """Every test starts from the same state of the global generators, on one thread, and with loggers that speak."""
    threads = torch.get_num_threads()
    for name in LOGGERS:  # an example or a process of several may have made them quiet
        logging.getLogger(name).setLevel(logging.NOTSET)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cold_caches() -> None:
    """The noise as in a process that has not drawn any: no words, tables or buffers kept."""
    clear_caches()


def probes_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("zo-probe")}


@pytest.fixture
def no_probe_thread_is_left() -> Iterator[None]:
    yield
    gc.collect()
    deadline = time.monotonic() + 10
    while probes_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not probes_threads()
