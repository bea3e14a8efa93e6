"""Work of several parts that an interrupt must not end between two of them."""

from __future__ import annotations

import threading
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

    def run(self, work: Callable[[], Result]) -> Result:
        """Returns what ``work`` returns, or raises what it raises."""
        if self._jobs is None:
            self._jobs = SimpleQueue()
            # A daemon: a process that ends does not wait for others that do not answer.
            threading.Thread(target=_serve, args=(self._jobs,), name="zo-exchange", daemon=True).start()
        answer: SimpleQueue[tuple[Result, BaseException | None]] = SimpleQueue()
        self._jobs.put((work, answer))
        found, error = answer.get()
        if error is not None:
            raise error
        return found


def _serve(jobs: SimpleQueue[Any]) -> None:
    while True:
        work, answer = jobs.get()
        try:
            answer.put((work(), None))
        except BaseException as error:  # it is raised where the work was asked for
            answer.put((None, error))
        del work, answer
