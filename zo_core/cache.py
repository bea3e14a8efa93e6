"""Reusable memory: caches bounded in bytes, and per-thread buffers.

What is kept for a step, such as the words of its directions, is removed when the step ends (`end_step`).
Small allocations that outlive a step would end up between the large ones that a forward allocates
and frees. The allocator could not merge those again, and the process would grow by much more than
what is kept.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from functools import lru_cache, wraps
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
P = ParamSpec("P")

#: Overhead of an entry besides the memory of its tensors: the tensor objects, the name, and its place here.
ENTRY_BYTES = 2048

_caches: weakref.WeakSet[ByteCache[Any]] = weakref.WeakSet()
#: What empties the caches of `kept_for_a_step`.
_plain: list[Callable[[], None]] = []


class ByteCache(Generic[T]):
    """The most recently used values, by name; a value is a tensor, or a tuple that contains tensors.

    The bound applies to the memory that is actually held. Views of one storage count once, with the whole
    storage, until the last of them is removed.

    Args:
        max_bytes: the bound. A single value that exceeds it is not kept.
        per_step: entries are removed when the step ends (`end_step`).

    Attributes:
        nbytes: bytes held now.
    """

    def __init__(self, max_bytes: int, *, per_step: bool = False):
        self.max_bytes, self.per_step = max_bytes, per_step
        self.nbytes = 0
        self._entries: OrderedDict[Hashable, T] = OrderedDict()
        self._users: dict[int, int] = {}  # of each storage
        self._fresh: set[Hashable] = set()  # put since the last step ended
        self._lock = threading.Lock()
        _caches.add(self)

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, name: Hashable) -> T | None:
        """The value stored under a name, or None; do not write to it."""
        with self._lock:
            value = self._entries.get(name)
            if value is not None:
                self._entries.move_to_end(name)
            return value

    def put(self, name: Hashable, value: T) -> T:
        """Stores a value, replaces any of the same name, and evicts the least recently used ones if necessary.

        Returns:
            The value.
        """
        with self._lock:
            if name in self._entries:
                self._remove(name)
            if ENTRY_BYTES + sum({s._cdata: s.nbytes() for s in _storages(value)}.values()) > self.max_bytes:
                return value
            self._entries[name] = value
            self._fresh.add(name)
            self.nbytes += ENTRY_BYTES
            for storage in _storages(value):
                users = self._users[storage._cdata] = self._users.get(storage._cdata, 0) + 1
                self.nbytes += storage.nbytes() if users == 1 else 0
            while self.nbytes > self.max_bytes:
                self._remove(next(iter(self._entries)))
            return value

    def keep(self, wanted: Callable[[Any], bool]) -> None:
        """Removes all entries whose name is not wanted."""
        with self._lock:
            for name in [name for name in self._entries if not wanted(name)]:
                self._remove(name)

    def clear(self) -> None:
        """Removes all entries."""
        with self._lock:
            self._entries.clear()
            self._users.clear()
            self._fresh.clear()
            self.nbytes = 0

    def end_step(self, late: bool) -> None:
        """Removes what was kept for this step, or with ``late`` only what was kept for the previous one."""
        self.keep(self._fresh.copy().__contains__ if late else lambda name: False)
        self._fresh.clear()

    def _remove(self, name: Hashable) -> None:
        value = self._entries.pop(name)
        self._fresh.discard(name)
        self.nbytes -= ENTRY_BYTES
        for storage in _storages(value):
            self._users[storage._cdata] -= 1
            if not self._users[storage._cdata]:
                del self._users[storage._cdata]
                self.nbytes -= storage.nbytes()


def _storages(value: Any) -> Iterator[Any]:
    for part in value if isinstance(value, tuple) else (value,):
        if isinstance(part, Tensor):
            yield part.untyped_storage()


def kept_for_a_step(function: Callable[P, T]) -> Callable[P, T]:
    """Keeps what a function returns, plain numbers rather than tensors, until the step ends."""
    wrapped = lru_cache(maxsize=1 << 13)(function)
    _plain.append(wrapped.cache_clear)
    return wrapped  # type: ignore[return-value]


def kept(max_bytes: int, *, per_step: bool = False) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A decorator that keeps what a function of positional arguments returns, in a `ByteCache`."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        cache: ByteCache[T] = ByteCache(max_bytes, per_step=per_step)

        @wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
            found = cache.get(args)
            return cache.put(args, function(*args, **kwargs)) if found is None else found

        wrapper.cache = cache  # type: ignore[attr-defined]
        return wrapper

    return decorate


_local = threading.local()


def workspace(name: str, size: int, device: torch.device) -> Tensor:
    """A float32 buffer of this thread, ``[size]``, with undefined contents.

    The allocator returns freed buffers of a chunk's size to the system each time, so fresh ones would
    cost page faults at every chunk.
    """
    buffers: dict[Any, Tensor] = _local.__dict__
    buffer = buffers.get((name, device))
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):
            buffer = buffers[name, device] = torch.empty(size, dtype=torch.float32, device=device)
    return buffer[:size]


#: Capacity of glibc's heap of a thread.
HEAP_BYTES = 64 << 20

#: Pieces that nearly fill such a heap. Larger ones might not come from it: initially glibc takes 128 KiB and more
#: from the system directly.
PIECE_BYTES, PIECES = 60_000, 1_100

_lids = threading.local()


def trim_heaps() -> None:
    """Returns freed memory to the operating system; does nothing without glibc.

    glibc has a heap for every thread, which keeps up to 64 MiB of freed memory that no other thread can use.
    ``malloc_trim`` releases what is free below a piece that is in use, but not what is free above the last
    one, and that is where activations were. So on its first call a thread allocates a piece near the end of
    its heap, which stays there for as long as the thread lives.
    """
    trim = _malloc_trim()
    if trim is None:
        return
    if not hasattr(_lids, "lid"):
        _lids.lid = [torch.UntypedStorage(PIECE_BYTES) for _ in range(PIECES)][-1]
    trim(0)


@lru_cache(maxsize=1)
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, or Windows
        return None
    return found


def end_step(late: bool = False) -> None:
    """Removes everything that was kept for a step.

    Args:
        late: updates of this step will be applied during the next one; what it kept is removed at the end of that.
    """
    for cache in list(_caches):
        if cache.per_step:
            cache.end_step(late)
    for empty in _plain:
        empty()


def clear_caches() -> None:
    """Empties all caches and buffers, as if the process had not drawn any noise yet."""
    global _local
    _local = threading.local()
    for cache in list(_caches):
        cache.clear()
    for empty in _plain:
        empty()
