"""A device that only exists on paper: which operation may run at the same time as which other one?

Streams and events of a CUDA device are simulated on the CPU. Values are computed in the order of the program, but
PyTorch's own sanitizer keeps the books: each operation belongs to a stream, or to a thread of the host; events order
these lines of time, and two operations on the same memory of which one writes are a race if no chain of events
orders them. So one run judges every order in which a device could have done its work.

What it does not know: kernels, the caching allocator beyond memory that is given up, how long anything takes, and
schedules of the host that were not run. Nor does it know that reading a loss waits for the device: the code has to do
without that.
"""

from __future__ import annotations

import gc
import itertools
import linecache
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.cuda._sanitizer import EventHandler, zip_arguments
from torch.utils._python_dispatch import TorchDispatchMode

from zo_core.streaming import copies, streaming

#: Lines of time. The probes' threads and the caller take turns, so they are one.
CALLER, POOL, ALLOCATOR, DEFAULT = range(4)

NAMES = {
    CALLER: "the caller's thread",
    POOL: "the thread of copies",
    ALLOCATOR: "the allocator",
    DEFAULT: "the default stream",
}

#: Operations that wait for the device, because the host gets a value.
READ_BY_HOST = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero"}

#: Functions of `streaming` that only wait on behalf of their caller.
ON_BEHALF = ("_moments", "_after_write", "_finish", "<listcomp>", "<genexpr>")


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Event:
    """A moment on a line of time; without a number it is one that was never recorded, and orders nothing."""

    def __init__(self, device: Device, number: int | None):
        self.device, self.number = device, number

    def synchronize(self) -> None:
        self.device.follow(self.device.thread, self)


class Stream(torch.Stream):
    """Has the names of `torch.cuda.Stream` that `zo_core` uses."""

    def __new__(cls, device: Device, line: int) -> Stream:
        return super().__new__(cls, stream_id=line, device_index=0, device_type=1)

    def __init__(self, device: Device, line: int):
        self.owner, self.line = device, line
        device.handler._handle_stream_creation(line)

    def wait_event(self, event: Event) -> None:
        self.owner.follow(self.line, event)

    def record_event(self, event: Any = None) -> Event:
        self.owner.launch(self.line)
        return self.owner.mark(self.line, site())


class Pool(ThreadPoolExecutor):
    """Its thread is a line of time, ordered after who submits and before who takes a result."""

    def __init__(self, device: Device, **more: Any):
        super().__init__(**more)
        self.device = device

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        submitted = self.device.mark(self.device.thread)
        return Outcome(self.device, super().submit(self._run, submitted, fn, args, kwargs))

    def _run(self, submitted: Event, fn: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Event]:
        self.device.here.thread = POOL
        self.device.follow(POOL, submitted)
        value = fn(*args, **kwargs)
        return value, self.device.mark(POOL)


class Outcome(Future[Any]):
    """A future whose taker comes after the end of its task; that order can be left out, and the wait stays."""

    def __init__(self, device: Device, future: Future[tuple[Any, Event]] | None = None):
        super().__init__()
        self.device, self.future = device, future

    def result(self, timeout: float | None = None) -> Any:
        value, end = (super().result(timeout), None) if self.future is None else self.future.result(timeout)
        if self.device.left_out(site()):
            return Event(self.device, None) if self.device.streams else None
        if end is not None:
            self.device.follow(self.device.thread, end)
        return value


class Device:
    """The lines of time, who touches which memory on them, and the races.

    Attributes:
        races: a sentence for each pair of operations that nothing orders.
        sites: the lines of `zo_core.streaming` that record an event or wait for one.
        without: the one of ``sites`` that is left out, as if nobody had written it.
        accesses: operations on memory that is watched, by line of time.
    """

    def __init__(self, *, streams: bool, without: str | None):
        self.handler, self.lock = EventHandler(), threading.RLock()
        self.streams, self.without = streams, without
        self.here = threading.local()
        self.numbers = itertools.count(1)
        self.races: list[str] = []
        self.sites: set[str] = set()
        self.accesses: Counter[int] = Counter()
        self.arenas: dict[int, Any] = {}
        self.given_up: set[int] = set()
        self.lent: dict[int, set[int]] = {}
        self.held: dict[int, Any] = {}
        self.within: dict[int, int] = {}
        self.files: dict[tuple[int, str], int] = {}
        self.pools: list[Pool] = []
        for line in (POOL, ALLOCATOR):
            self.handler._handle_stream_creation(line)
        self.made = 0
        self.default = self.Stream()
        self.mode = Watch(self)

    # Names of torch.cuda

    def Stream(self, device: torch.device | None = None) -> Stream:
        self.made += 1
        return Stream(self, DEFAULT + self.made - 1)

    def current_stream(self, device: torch.device | None = None) -> Stream:
        return getattr(self.here, "stream", self.default)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.here.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self.here.stream = before

    def is_initialized(self) -> bool:
        return self.streams

    def is_available(self) -> bool:
        return False

    # Order

    @property
    def thread(self) -> int:
        return getattr(self.here, "thread", CALLER)

    def mark(self, line: int, place: str | None = None) -> Event:
        """The moment that a line of time has reached."""
        with self.lock:
            if self.left_out(place):
                return Event(self, None)
            event = Event(self, next(self.numbers))
            self.handler._handle_event_creation(event.number)
            self.handler._handle_event_record(event.number, line)
            return event

    def follow(self, line: int, event: Event) -> None:
        """Orders what comes on a line of time after an event."""
        with self.lock:
            if event.number is not None and not self.left_out(site()):
                self.handler._handle_event_wait(event.number, line)

    def launch(self, line: int) -> None:
        """Orders a stream after what its thread knows to have happened."""
        self._after(line, self.thread)

    def _after(self, line: int, other: int) -> None:
        with self.lock:
            event = next(self.numbers)
            self.handler._handle_event_creation(event)
            self.handler._handle_event_record(event, other)
            self.handler._handle_event_wait(event, line)
            self.handler._handle_event_deletion(event)

    def left_out(self, place: str | None) -> bool:
        if place is not None:
            self.sites.add(place)
        return place is not None and place == self.without

    # Memory

    def hold(self, memory: Tensor) -> Tensor:
        """Watches an arena slot; its memory is kept, so that nothing else gets its address."""
        self.arenas[address(memory)] = memory.untyped_storage()
        return memory

    def keep(self, tensor: Tensor, memory: Tensor) -> None:
        """Watches a tensor of the host that copies use, as a part of ``memory``, which is watched as a whole."""
        self.held[address(memory)] = memory.untyped_storage()
        self.within[address(tensor)] = address(memory)

    def place(self, tensor: Tensor) -> int:
        """The address of the memory that is watched as a whole."""
        pointer = address(tensor)
        return self.within.get(pointer, pointer)

    def give_up(self) -> None:
        """Lets the allocator give memory that nobody holds any more to the next kernel of the stream it came from."""
        if not self.streams:
            return
        for pointer, memory in self.arenas.items():
            if pointer not in self.given_up and torch._C._storage_Use_Count(memory._cdata) <= HELD:
                self.given_up.add(pointer)
                for line in (DEFAULT, *self.lent.get(pointer, ())):
                    self._after(ALLOCATOR, line)
                self.record(ALLOCATOR, "the next owner of the memory", set(), {pointer})

    def finish(self) -> None:
        """Ends the threads of copies, also those of engines that nobody has closed, and gives up their memory."""
        for pool in self.pools:
            pool.shutdown()
        gc.collect()
        self.give_up()

    def touch(self, operation: str, reads: set[int], writes: set[int], *, blocks: bool) -> None:
        """An operation on watched memory, on the current stream if an arena slot is among it, else on the host."""
        thread, line = self.thread, self.thread
        if self.streams and not self.arenas.keys().isdisjoint(reads | writes):
            line = self.current_stream().line
            self.launch(line)
        self.record(line, operation, reads, writes)
        if blocks and line != thread:
            self._after(thread, line)

    def touch_file(self, operation: str, owner: object, block: str, *, write: bool) -> None:
        """A block's file, which threads of the host read and write."""
        pointer = self.files.setdefault((id(owner), block), -1 - len(self.files))
        self.record(self.thread, operation, set() if write else {pointer}, {pointer} if write else set())

    def record(self, line: int, operation: str, reads: set[int], writes: set[int]) -> None:
        with self.lock:
            self.accesses[line] += 1
            aliases: dict[int, list[str]] = {pointer: [] for pointer in reads | writes}
            found = self.handler._handle_kernel_launch(line, reads - writes, writes, set(), operation, aliases)
            self.races += [self.describe(error) for error in found]

    def describe(self, error: Any) -> str:
        pointer = error.data_ptr
        where = "a file" if pointer < 0 else "host memory" if pointer in self.held else "an arena slot"
        one, other = map(_described, (error.current_access, error.previous_access))
        return f"{where}: {one}, not ordered after {other}"


class Watch(TorchDispatchMode):
    """Tells the device which watched memory each operation touches."""

    def __init__(self, device: Device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = self.device
        if func is torch.ops.aten.record_stream.default:
            if not device.left_out(site()):
                device.lent.setdefault(address(args[0]), set()).add(args[1].stream_id)
            return None
        result = func(*args, **kwargs)
        name = func._schema.name
        reads, writes = self._touched(func._schema, args, kwargs)
        if reads or writes:
            with_host = not device.held.keys().isdisjoint(reads | writes)
            blocks = name in READ_BY_HOST or (with_host and not _non_blocking(func, args, kwargs))
            device.touch(name, reads, writes, blocks=blocks)
        return result

    def _touched(self, schema: Any, args: Any, kwargs: Any) -> tuple[set[int], set[int]]:
        """The watched memory that an operation reads, and that it writes; making a view is neither."""
        reads: set[int] = set()
        writes: set[int] = set()
        if not any(map(self.watched, _tensors((*args, *kwargs.values())))):
            return reads, writes
        makes = schema.name.split("::")[1]
        if makes.startswith("new_") or makes.endswith("_like") or makes == "set_":
            return reads, writes
        for argument, value in zip_arguments(schema, args, kwargs):
            is_write = argument.alias_info is not None and argument.alias_info.is_write
            if argument.alias_info is not None and not is_write:
                continue
            for tensor in filter(self.watched, _tensors((value,))):
                (writes if is_write else reads).add(self.device.place(tensor))
        return reads, writes

    def watched(self, tensor: Tensor) -> bool:
        pointer = self.device.place(tensor)
        return bool(tensor.numel()) and (pointer in self.device.arenas or pointer in self.device.held)


def _described(access: Any) -> str:
    line = NAMES.get(access.stream, f"stream {access.stream}")
    return f"{access.operator} {access.type} it on {line} ({' < '.join(access.stack_trace)})"


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors among the arguments of an operation, and in its lists of tensors."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _non_blocking(func: Any, args: Any, kwargs: Any) -> bool:
    return func is torch.ops.aten.copy_.default and bool((*args, False)[2] or kwargs.get("non_blocking"))


class Places:
    """Stands for the module `traceback` of the sanitizer, whose traces take longer than all the rest."""

    def __init__(self) -> None:
        self.StackSummary = self

    def walk_stack(self, frame: Any) -> Any:
        return frame

    def extract(self, frame: Any, lookup_lines: bool) -> list[str]:
        """The innermost places in `zo_core`."""
        found: list[str] = []
        while frame is not None and len(found) < 3:
            code = frame.f_code
            if "/zo_core/" in code.co_filename:
                found.insert(0, f"{code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno} {code.co_name}")
            frame = frame.f_back
        return found


def site() -> str | None:
    """The line of `zo_core.streaming` on whose behalf the running code waits or records; None if there is none."""
    frame = sys._getframe(1)
    inner = None
    while frame is not None:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        if file in (copies.__file__, streaming.__file__) and function not in ON_BEHALF:
            place = f"{function}: {linecache.getline(file, frame.f_lineno).strip()}"
            if file == streaming.__file__:
                return place
            inner = inner or place
        frame = frame.f_back
    return inner


def _held() -> int:
    memory = torch.empty(1).untyped_storage()
    return int(torch._C._storage_Use_Count(memory._cdata))


#: The use count of memory that only a `Device` holds.
HELD = _held()
