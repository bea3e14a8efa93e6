"""Numbers and locks that the processes of a host have in common for the blocks that they share.

Both are in memory without a name (``memfd``), and the locks belong to an open file: the system takes them back when
a process ends in any way, so nothing is left behind, and a process that is gone holds up nobody.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import RanksError, StateError

if sys.platform == "linux":
    import fcntl

#: Seconds for which a process waits for another one to copy a block, or to come to the same step.
PATIENCE = 300.0
#: Bytes of the file that are locked, though they are not there: those of blocks, of living processes, and of the end.
BLOCKS, LIVING, END = 0, 1 << 32, 1 << 33
#: Number of updates that a process has queued for a block that it does not share any more.
GONE = 1 << 62


def host() -> tuple[str, int, int] | None:
    """What processes that can share memory have in common; None where that is not possible."""
    if not hasattr(os, "memfd_create") or not hasattr(fcntl, "F_OFD_SETLK"):
        return None
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip(), os.stat("/proc/self/ns/pid").st_ino, os.getuid()
    except OSError:
        return None


def new_memory(name: str, size: int) -> tuple[int, mmap.mmap]:
    """New memory that other processes can map, and its file, through which they find it; close that afterwards.

    Raises:
        OSError: there is not so much memory.
    """
    size = max(1, -(-size // mmap.PAGESIZE)) * mmap.PAGESIZE
    file = os.memfd_create(name)
    try:
        os.posix_fallocate(file, 0, size)  # or too little memory would be a signal later, and not an error now
        return file, mmap.mmap(file, size)
    except BaseException:
        os.close(file)
        raise


def open_memory(process: int, file: int) -> int:
    """Opens a file of `new_memory` that another process has open.

    Raises:
        OSError: this process may not.
    """
    return os.open(f"/proc/{process}/fd/{file}", os.O_RDWR)


def mapped_memory(process: int, file: int) -> mmap.mmap:
    """The memory of a file that another process has open, as `open_memory`."""
    opened = open_memory(process, file)
    try:
        return mmap.mmap(opened, 0)
    finally:
        os.close(opened)


class Board:
    """For each block, how many updates the stored values have had, and how many each process has queued.

    Args:
        file: of memory with at least `Board.size` bytes, zeros at first. It is closed with this object, and has to be
            one that this process has opened itself: locks belong to it.
        rank: index of this process among those that share.
        ranks: their number.
        blocks: number of blocks.
    """

    def __init__(self, file: int, rank: int, ranks: int, blocks: int):
        self.file, self.rank, self.ranks, self.blocks = file, rank, ranks, blocks
        weakref.finalize(self, os.close, file)
        self.numbers = memoryview(mmap.mmap(file, 0)).cast("q")
        self._set(fcntl.F_WRLCK, LIVING + rank)

    @staticmethod
    def size(ranks: int, blocks: int) -> int:
        """Bytes of the numbers."""
        return 8 * blocks * (2 + ranks)

    def stored(self, block: int) -> int:
        """How many updates the stored values of a block have had."""
        return self.numbers[block]

    def publish(self, block: int, number: int) -> None:
        """Tells the others how many updates this process has queued for a block; the stored ones are never more."""
        self.numbers[(2 + self.rank) * self.blocks + block] = number

    def lagging(self, block: int, number: int) -> list[int]:
        """The living processes that have not queued so many updates yet, and could still need earlier values."""
        others = (rank for rank in range(self.ranks) if rank != self.rank)
        behind = [rank for rank in others if self.numbers[(2 + rank) * self.blocks + block] < number]
        return [rank for rank in behind if self.lives(rank)]

    def wait(self, block: int, number: int) -> None:
        """Returns when no process is lagging.

        Raises:
            RanksError: one still is after `PATIENCE`.
        """
        for _ in _patiently():
            behind = self.lagging(block, number)
            if not behind:
                return
        raise RanksError(
            f"process {behind[0]} of this host has not come to the same step after {PATIENCE:.0f} s, so a layer that "
            "the processes share could not be stored; all processes have to make the same steps"
        )

    def lives(self, rank: int) -> bool:
        """Whether another process still uses the board."""
        if not self._try(fcntl.F_RDLCK, LIVING + rank):
            return True
        self._set(fcntl.F_UNLCK, LIVING + rank)
        return False

    @contextmanager
    def reading(self, block: int) -> Iterator[None]:
        """A context in which nobody writes a block.

        Raises:
            StateError: a process has ended while it wrote the block.
            RanksError: a process hangs while it copies the block.
        """
        with self._locked(fcntl.F_RDLCK, block):
            yield

    @contextmanager
    def writing(self, block: int, number: int) -> Iterator[bool]:
        """A context in which only this process uses a block; yields whether it still has to be written.

        After an exception in it the block counts as damaged.

        Args:
            block: the block.
            number: how many updates the new values have had.

        Raises:
            StateError, RanksError: as `reading`.
        """
        with self._locked(fcntl.F_WRLCK, block):
            if self.numbers[block] >= number:
                yield False
                return
            self.numbers[self.blocks + block] = 1 + self.rank
            yield True
            self.numbers[block] = number
            self.unharmed(block)

    def unharmed(self, block: int) -> None:
        """Says that the values of a block are whole."""
        self.numbers[self.blocks + block] = 0

    @contextmanager
    def _locked(self, kind: int, block: int) -> Iterator[None]:
        for _ in _patiently():
            if self._try(kind, BLOCKS + block):
                break
        else:
            raise RanksError(
                f"another process of this host has copied one layer for {PATIENCE:.0f} s; see what it prints"
            )
        try:
            writer = self.numbers[self.blocks + block]
            if writer:
                raise StateError(
                    f"process {writer - 1} of this host ended while it stored a layer that the processes share, so "
                    "part of its weights are those of another step; continue from the last checkpoint"
                )
            yield
        finally:
            self._set(fcntl.F_UNLCK, BLOCKS + block)

    def leave(self) -> bool:
        """Ends the use of the board; returns whether this process was the last one."""
        for _ in _patiently():
            if self._try(fcntl.F_WRLCK, END):
                break
        try:
            self._set(fcntl.F_UNLCK, LIVING + self.rank)
            return not any(self.lives(rank) for rank in range(self.ranks) if rank != self.rank)
        finally:
            self._set(fcntl.F_UNLCK, END)

    def _try(self, kind: int, at: int) -> bool:
        try:
            self._set(kind, at)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def _set(self, kind: int, at: int) -> None:
        fcntl.fcntl(self.file, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, at, 1, 0))


def _patiently() -> Iterator[None]:
    """Tries again and again, for `PATIENCE`."""
    end, pause = time.monotonic() + PATIENCE, 1e-4
    while True:
        yield
        if time.monotonic() > end:
            return
        time.sleep(pause)
        pause = min(2 * pause, 5e-3)
