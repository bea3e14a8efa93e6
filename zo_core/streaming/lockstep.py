"""Several closures as coroutines: one runs at a time, and hands over at fixed places.

A closure that arrives at such a place hands over to one that is behind it, and goes on if none is. So the last one to
leave a block is the first to enter the next, and n closures change turns n - 1 times per block.

A user's closure cannot be cut in half, but it can be a thread that only runs when it has the turn.
Each thread sees the caller's grad mode, autocast, context variables, function modes and dispatch modes, and computes
with as many threads of its own as the caller: matrix products of some shapes round differently on one core and on two.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ..ambient import ambient

Switch = Callable[[int], None]


class _Abort(BaseException):
    """Unwinds a closure whose sibling has failed."""


class Lockstep:
    """Runs closures in turns. Its threads wait between runs, and end with this object.

    Args:
        leave: called with a closure's index when it gives up the turn.
        enter: called with a closure's index when it gets the turn.
    """

    def __init__(self, leave: Switch, enter: Switch):
        self.leave, self.enter = leave, enter
        self.workers: list[_Worker] = []
        self.live: list[int] = []
        #: How many rendezvous each closure has come to.
        self.passed: list[int] = []
        self.current = -1
        self.error: BaseException | None = None
        self.main = threading.Semaphore(0)
        weakref.finalize(self, _stop, self.workers)

    def run(self, closures: Sequence[Callable[[], Any]]) -> list[Any]:
        """Runs all closures and returns their results; raises the first exception of any of them."""
        while len(self.workers) < len(closures):
            self.workers.append(_Worker(len(self.workers)))
        self.error = None
        self.live = list(range(len(closures)))
        self.passed = [0] * len(closures)
        context = ambient()
        for worker, closure in zip(self.workers, closures, strict=False):
            worker.task = partial(self._task, worker, partial(context, closure))
        self._hand_to(0)
        while True:
            try:
                if self.main.acquire(timeout=0.2):  # a signal just before a wait is handled at its end
                    break
            except BaseException as error:  # Ctrl-C arrives here: the closures unwind at their next turn
                self.error = error
        if self.error is not None:
            _stop(self.workers)  # a traceback may hold this object for long
            raise self.error
        results = [worker.result for worker in self.workers[: len(closures)]]
        for worker in self.workers:
            worker.result = None
        return results

    def rendezvous(self) -> None:
        """Called by the running closure: hands over to one that is behind, and returns when the turn comes back."""
        if self.error is not None:
            raise _Abort
        index = self.current
        self.passed[index] += 1
        following = min(self.live, key=self.passed.__getitem__)
        if self.passed[following] == self.passed[index]:
            return
        self.leave(index)
        self._hand_to(following)
        self.workers[index].turn.acquire()
        self.enter(index)
        if self.error is not None:
            raise _Abort

    def close(self) -> None:
        """Ends the threads; a later run starts new ones."""
        workers = list(self.workers)
        _stop(self.workers)
        for worker in workers:
            worker.join()

    def _task(self, worker: _Worker, closure: Callable[[], Any]) -> None:
        """What a worker does with its first turn of a run."""
        try:
            self.enter(worker.index)
            if self.error is None:
                worker.result = closure()
        except _Abort:
            pass
        except BaseException as error:
            self.error = self.error or error
        self.leave(worker.index)
        self.live.remove(worker.index)
        if self.live:
            self._hand_to(min(self.live, key=self.passed.__getitem__))
        else:
            self.current = -1
            self.main.release()

    def _hand_to(self, index: int) -> None:
        self.current = index
        self.workers[index].turn.release()


class _Worker(threading.Thread):
    """A thread that runs its task when it gets the turn, and holds no references in between."""

    def __init__(self, index: int):
        super().__init__(name=f"zo-probe-{index}", daemon=True)
        self.index = index
        self.turn = threading.Lock()
        self.turn.acquire()
        self.task: Callable[[], None] | None = None
        self.result: Any = None
        self.start()

    def run(self) -> None:
        while True:
            self.turn.acquire()
            task, self.task = self.task, None
            if task is None:
                return
            task()
            del task


def _stop(workers: list[_Worker]) -> None:
    """Ends the threads and waits for them: a thread that is left when the interpreter exits aborts the process."""
    ending = list(workers)
    workers.clear()
    for worker in ending:
        worker.turn.release()
    for worker in ending:
        if worker is not threading.current_thread():
            worker.join()
