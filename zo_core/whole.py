"""Work of several parts that an interrupt must not end between two of them."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

Result = TypeVar("Result")


class Whole:
    """Runs one piece of work after another on a thread of its own.

    Python raises interrupts in the main thread. One that comes while it waits here ends the waiting: the work goes on
    to its end, and what is run next comes after it.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Any] | None = None
        self._process = 0

    def run(self, work: Callable[[], Result]) -> Result:
        """Returns what ``work`` returns, or raises what it raises."""
        if self._jobs is None or self._process != os.getpid():  # a forked process has no threads
            jobs: SimpleQueue[Any] = SimpleQueue()
            # A daemon: a process that ends does not wait for others that do not answer.
            thread = threading.Thread(target=_serve, args=(jobs,), name="zo-exchange", daemon=True)
            thread.start()
            weakref.finalize(self, _end, jobs, thread)
            self._jobs, self._process = jobs, os.getpid()
        answer: SimpleQueue[tuple[Result, BaseException | None]] = SimpleQueue()
        self._jobs.put((work, answer))
        found, error = answer.get()
        if error is not None:
            raise error
        return found


def _end(jobs: SimpleQueue[Any], thread: threading.Thread) -> None:
    """Ends an idle thread, also before the process ends: a daemon that is left then may abort it."""
    jobs.put(None)
    if thread is not threading.current_thread():
        thread.join(timeout=1.0)


def _serve(jobs: SimpleQueue[Any]) -> None:
    while (job := jobs.get()) is not None:
        work, answer = job
        try:
            answer.put((work(), None))
        except BaseException as error:  # it is raised where the work was asked for
            answer.put((None, error))
        del job, work, answer
