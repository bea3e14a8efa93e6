"""Law: numbers in page-locked memory stay there until the kernel that fetches them has run."""

from __future__ import annotations

import ctypes
import random
from collections import deque
from functools import partial

import pytest

from zo_core.noise.mailbox import Mailbox

HALF = 32


class Late:
    """A stream that runs nothing before somebody waits for it."""

    def __init__(self) -> None:
        self.queue: deque[tuple[int, list[int]]] = deque()
        self.launched = self.done = self.waits = 0

    def launch(self, address: int, numbers: list[int]) -> None:
        self.queue.append((address, numbers))
        self.launched += 1

    def moment(self) -> Moment:
        return Moment(self)

    def run(self, until: int) -> None:
        while self.done < until:
            address, numbers = self.queue.popleft()
            assert list((ctypes.c_int64 * len(numbers)).from_address(address)) == numbers
            self.done += 1


class Moment:
    """The end of what is queued on a stream."""

    def __init__(self, stream: Late):
        self.stream, self.until = stream, stream.launched

    def synchronize(self) -> None:
        self.stream.waits += 1
        self.stream.run(self.until)


@pytest.mark.parametrize("seed", range(3))
def test_numbers_stay_until_they_are_fetched(seed: int) -> None:
    stream, draw = Late(), random.Random(seed)
    box = Mailbox(False, stream.moment, HALF)
    for _ in range(200):
        numbers = [draw.randrange(-(1 << 63), 1 << 63) for _ in range(draw.randint(1, HALF))]
        box.put(numbers, partial(stream.launch, numbers=numbers))
    assert stream.waits > 10
    assert len(stream.queue) < 40  # the rest has been waited for, and not more of it
    stream.run(stream.launched)
