"""Law: on CUDA a streamed step takes as long as the slowest of copying in, copying out and computing, not as their sum.

Time is simulated: streams are clocks, events are readings of them, and every copy, forward and update takes the time
that it is given here. The host takes none.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from models import batch
from race_scenarios import Stack, loss_of
from torch import Tensor

from zo_core import ZeroOrder
from zo_core.streaming import build, streaming
from zo_core.streaming.copies import Copies
from zo_core.streaming.store import RamStore
from zo_core.streaming.streaming import Streaming, arena_slots

BLOCKS = 24


@dataclass
class Clock:
    """A stream."""

    time: float = 0.0

    def wait_event(self, event: Clock) -> None:
        self.time = max(self.time, event.time)

    def record_event(self) -> Clock:
        return Clock(self.time)

    def synchronize(self) -> None:
        """The host has no time of its own."""


class Device:
    """Has the names of `torch.cuda` that `Copies` uses."""

    def __init__(self) -> None:
        self.here = threading.local()
        self.default = Clock()
        self.clocks = [self.default]

    def Stream(self, device: torch.device) -> Clock:
        self.clocks.append(Clock())
        return self.clocks[-1]

    def current_stream(self, device: torch.device | None = None) -> Clock:
        return getattr(self.here, "stream", self.default)

    @contextmanager
    def stream(self, stream: Clock) -> Iterator[None]:
        before, self.here.stream = self.current_stream(), stream
        yield
        self.here.stream = before

    def takes(self, seconds: float) -> None:
        self.current_stream().time += seconds

    def idle(self) -> float:
        """Waits for everything; returns what time it is then."""
        end = max(clock.time for clock in self.clocks)
        for clock in self.clocks:
            clock.time = end
        return end


def step_time(slots: int, come: float, go: float, compute: float, update: float) -> float:
    """Seconds of a step from an idle device to an idle device; ``compute`` is for all probes together."""
    device = Device()

    class Store(RamStore):
        def read(self, block: str, into: dict[str, Tensor]) -> None:
            super().read(block, into)
            device.takes(come)

        def write(self, block: str, tensors: dict[str, Tensor], changed: Any) -> None:
            super().write(block, tensors, changed)
            device.takes(go)

    apply = Streaming._apply

    def timed(self: Streaming, *args: Any) -> None:
        device.takes(update)
        apply(self, *args)

    with (
        patch.object(streaming, "Copies", partial(Copies, streams=device)),
        patch.object(streaming, "arena_slots", lambda _: slots),
        patch.object(Tensor, "record_stream", lambda *_: None),
        patch.object(build, "RamStore", Store),
        patch.object(Streaming, "_apply", timed),
    ):
        model = Stack(BLOCKS)
        loss = loss_of(model, batch("stack"), "cpu")
        zo = ZeroOrder(model, lr=1e-3, offload="cpu", brake=None)
        for layer in model.layers:
            layer[1].register_forward_hook(lambda *_: device.takes(compute / 2))
        for _ in range(3):  # the order is known, and every update is pending
            zo.step(loss)
        start = device.idle()
        zo.step(loss)
        end = device.idle()
        zo.close()
    return end - start


@pytest.mark.parametrize(
    ("come", "go", "compute"), [(1.0, 1.0, 0.5), (1.0, 1.0, 0.9), (1.0, 0.6, 0.2), (0.6, 1.0, 0.5), (0.7, 0.7, 1.0)]
)
def test_copying_in_copying_out_and_computing_overlap(come: float, go: float, compute: float) -> None:
    update = 0.1
    slowest = max(come, go, compute + update)
    seconds = step_time(arena_slots(torch.device("cuda")), come, go, compute, update)
    assert seconds <= BLOCKS * slowest + come + go + compute + update


def test_with_two_slots_half_of_the_updates_are_waited_for() -> None:
    """The next block is fetched before the update of the present one, which would otherwise be in its way each time."""
    update, slowest = 0.1, BLOCKS * 1.0
    assert slowest + 0.9 < step_time(2, 1.0, 1.0, 0.5, update) <= slowest + BLOCKS / 2 * update + 0.1
