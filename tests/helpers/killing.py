"""Runs that are killed again and again: each in a child of this process, which has everything imported."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path


def killed(run: Callable[[], object], log: Path, kills: int, steps: int, generator: random.Random, soon: float) -> None:
    """Runs ``run`` in a child until it ends by itself, after some that were killed one after the other.

    Args:
        run: goes on with what is there.
        log: the seed log that it writes; a step is at least 24 bytes.
        kills: how many children are killed.
        steps: a child is killed after 1 to this many steps.
        generator: draws when.
        soon: the probability with which a child is killed within 0.6 seconds, whatever it has done.
    """
    for number in range(kills + 1):
        child = os.fork()
        if child == 0:
            run()
            os._exit(0)
        if number == kills:
            assert os.waitpid(child, 0)[1] == 0, "the last run failed"
            return
        before = log.stat().st_size if log.exists() else 0
        deadline = time.monotonic() + (generator.uniform(0.0, 0.6) if generator.random() < soon else 60)
        wanted = generator.randint(1, steps)
        while time.monotonic() < deadline and not (log.exists() and log.stat().st_size >= before + 24 * wanted):
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "a child ended by itself"
            time.sleep(0.001)
        time.sleep(generator.uniform(0.0, 0.03))
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
