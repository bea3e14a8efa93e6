"""Runs that are killed again and again: each in a child of this process, which has everything imported."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def apart(test: str, call: str, folder: Path, preloaded: str = "sys") -> None:
    """Calls a function of a test's module in a process of its own, with one thread.

    Args:
        test: the file of the module.
        call: the call, as code; ``folder`` is an argument.
        folder: its folder.
        preloaded: modules to import before, so that children of the process have them.
    """
    module = Path(test)
    code = f"import gc, sys; sys.path[:0] = ['.', 'tests/helpers', {str(module.parent)!r}]; import {preloaded}; "
    code += f"import {module.stem}; from pathlib import Path; folder = Path(sys.argv[1]); "
    code += f"gc.freeze(); {module.stem}.{call}; gc.unfreeze()"  # else each collection looks through what was imported
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
