"""Copies in the background: a thread, and on CUDA two streams that are ordered by events.

On CUDA the thread only enqueues copies, and nothing waits for the device: one event marks when a copy may
begin (its destination is no longer in use) and another when it is done, and streams wait for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Watchers, watched_by, watchers
from ..errors import ConfigError

#: A moment on a stream of the device; None where there are no streams, and everything has happened.
Moment = Any


def check_device(device: torch.device) -> None:
    """Raises `ConfigError` for devices whose copies in the background would not be ordered against the computation."""
    if device.type not in ("cpu", "cuda", "meta"):
        raise ConfigError(
            [
                f"device={str(device)!r}: layers are streamed to CUDA devices and on CPUs only; leave out offload, or "
                "compute on the CPU (device='cpu', use_cpu=True with ZOTrainer, accelerator='cpu' with Lightning)"
            ]
        )


def with_index(device: torch.device) -> torch.device:
    """The device with its index, because "cuda" and "cuda:0" are one device and two keys."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


class Copies:
    """Runs copies one after another, in the background.

    Args:
        device: the device that they go to and come from.
        streams: has the names of `torch.cuda` that make and use streams; None for CUDA's own, or, on a CPU, for no
            streams.
    """

    def __init__(self, device: torch.device, streams: Any = None):
        self.device = device
        self.pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="zo-offload")
        self.streams = torch.cuda if streams is None and device.type == "cuda" else streams
        self.incoming = None if self.streams is None else self.streams.Stream(device)
        self.outgoing = None if self.streams is None else self.streams.Stream(device)

    def fetch(self, work: Callable[[], object], after: Iterable[Moment], here: bool = False) -> Future[Moment]:
        """Starts a copy to the device, once the moments ``after`` have passed; ``here`` calls ``work`` at once."""
        return self._start(here, self.incoming, work, list(after))

    def send(self, work: Callable[[], object], after: Iterable[Moment], here: bool = False) -> Future[Moment]:
        """Starts a copy from the device, as `fetch` does one to it."""
        return self._start(here, self.outgoing, work, list(after))

    def _start(self, here: bool, stream: Any, work: Callable[[], object], after: list[Moment]) -> Future[Moment]:
        if not here:
            return self.pool.submit(self._run, stream, work, after, watchers())
        done: Future[Moment] = Future()
        try:
            done.set_result(self._run(stream, work, after, ()))  # in the thread of whoever watches
        except Exception as error:
            done.set_exception(error)  # raised by whoever needs the copy, as that of a thread is
        return done

    def lend(self, memory: Tensor) -> Tensor:
        """Tells the allocator that copies use this memory: who drops it while one runs must not free it for others."""
        for stream in (self.incoming, self.outgoing):
            if stream is not None:
                memory.record_stream(stream)
        return memory

    def now(self) -> Moment:
        """The moment at which the work that is queued on the current stream ends."""
        return None if self.streams is None else self.streams.current_stream(self.device).record_event()

    def let_wait(self, copy: Future[Moment]) -> None:
        """Makes all later work on the current stream wait for a copy."""
        moment = copy.result()
        if moment is not None:
            self.streams.current_stream(self.device).wait_event(moment)

    def drain(self) -> None:
        """Blocks until the work that is queued on the current stream is done, and with it the copies it waits for."""
        if self.streams is not None:
            self.now().synchronize()

    def close(self) -> None:
        """Ends the thread."""
        self.pool.shutdown()

    @staticmethod
    def wait(copy: Future[Moment]) -> None:
        """Blocks until a copy is done."""
        moment = copy.result()
        if moment is not None:
            moment.synchronize()

    def _run(self, stream: Any, work: Callable[[], object], after: list[Moment], watching: Watchers) -> Moment:
        with watched_by(watching):
            if stream is None:
                work()
                return None
            with self.streams.stream(stream):
                for moment in after:
                    stream.wait_event(moment)
                work()
                return stream.record_event()
