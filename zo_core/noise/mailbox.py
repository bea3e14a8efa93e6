"""Small tables for kernels, which fetch them out of host memory by themselves.

A copy would have to wait for its turn. The copy engine of a GPU is busy for as long as layers are streamed, and changes
between streams after milliseconds; kernels that wait for a table of a kilobyte would then no longer overlap with the
transfer of the next layer. A kernel reads page-locked memory past that engine.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

#: Numbers in each half of a mailbox; a row of the kernels' table has 11 and 3 for each term.
HALF = 1 << 15


class Mailbox:
    """Page-locked memory for the numbers of one stream's kernels, in two halves that take turns.

    Before a half is used again, its last reader has to be done: the host waits for it, which it would not do in fact,
    because it would have to be ahead by hundreds of launches.

    Args:
        pinned: whether the memory is page-locked; False where the device is the CPU.
        moment: returns the event at which the work that is queued on the stream ends.
        half: numbers in each half.
    """

    def __init__(self, pinned: bool, moment: Callable[[], Any], half: int = HALF):
        with torch.inference_mode(False):
            self.memory = torch.empty(2 * half, dtype=torch.int64, pin_memory=pinned)
        self.moment, self.half = moment, half
        self._numbers = self.memory.numpy()
        self._ends: list[Any] = [None, None]
        self._turn = self._at = 0
        self._lock = threading.Lock()

    def put(self, numbers: Sequence[int], read: Callable[[int], Any]) -> Any:
        """Calls ``read`` with the address of the numbers, of which there are at most ``half``; it launches a kernel."""
        with self._lock:
            if self._at + len(numbers) > self.half:
                self._ends[self._turn] = self.moment()
                self._turn, self._at = 1 - self._turn, 0
                if self._ends[self._turn] is not None:
                    self._ends[self._turn].synchronize()
            at = self._turn * self.half + self._at
            self._at += len(numbers)
            self._numbers[at : at + len(numbers)] = numbers
            return read(self.memory.data_ptr() + 8 * at)


#: By device and stream. A process has few streams, and PyTorch makes no more than 32 of its own for a device.
_boxes: dict[tuple[torch.device, int], Mailbox] = {}


def mailbox(device: torch.device) -> Mailbox:
    """The mailbox of the current stream of a CUDA device."""
    stream = torch.cuda.current_stream(device)
    name = device, stream.stream_id
    box = _boxes.get(name)
    if box is None:
        box = _boxes[name] = Mailbox(True, lambda: torch.cuda.current_stream(device).record_event())
    return box
