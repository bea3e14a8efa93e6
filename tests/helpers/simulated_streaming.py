"""Streams models through a simulated device: what `zo_core.streaming` uses of CUDA, replaced for the time of a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from mmap import mmap
from typing import Any
from unittest.mock import patch

import torch
from simulated_device import Device, Outcome, Places, Pool, address
from torch import Tensor
from torch.cuda import _sanitizer

from zo_core import ambient
from zo_core.streaming import build, copies, store, streaming, tensor_file
from zo_core.streaming.copies import Copies
from zo_core.streaming.store import DiskStore, RamStore
from zo_core.streaming.streaming import Streaming, arena_slots
from zo_core.streaming.tensor_file import Tensors


class Torch:
    """The module `torch` with another device."""

    def __init__(self, device: Device):
        self.cuda = device

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class Futures:
    """Makes the futures of copies that the caller has begun."""

    def __init__(self, device: Device):
        self.device = device

    def __getitem__(self, kind: Any) -> Futures:
        return self

    def __call__(self) -> Outcome:
        return Outcome(self.device)


def host_memory(device: Device, here: bool) -> type[RamStore]:
    """The class of a store as on CUDA: its memory is its own, and watched; ``here`` as in `simulated`."""

    class HostMemory(RamStore):
        def __init__(self, pinned: bool = False):
            super().__init__()
            self.pinned = self.registers = device.streams

        def put(self, block: str, tensors: Tensors) -> None:
            super().put(block, tensors)
            self._watch(block)

        def whole(self, block: str) -> Tensors:
            added = block in self._zeros
            found = super().whole(block)
            if added:
                self._watch(block)
            return found

        def _registered(self, size: int) -> mmap:
            return mmap(-1, size)

        def _watch(self, block: str) -> None:
            """A slab is one piece of memory, though its tensors have storages of their own."""
            within = {id(tensor): slab.memory for slab in self.slabs.get(block, ()) for tensor in slab.values()}
            for tensor in self.blocks[block].values():
                device.keep(tensor, within.get(id(tensor), tensor))

        def returns_soon(self, nbytes: int) -> bool:
            return here

    return HostMemory


def disk(device: Device) -> list[tuple[Any, str, Any]]:
    """Changes that show a device what passes torch by: files, and the bytes of tensors."""
    fill, bytes_of, put, read, mapped = (
        store._fill,
        tensor_file.bytes_of,
        *(getattr(DiskStore, name) for name in ("put", "read", "mapped")),
    )

    def filled(descriptor: int, tensor: Tensor, offset: int) -> None:
        fill(descriptor, tensor, offset)
        if address(tensor) in device.arenas:
            device.touch("reading a file", set(), {address(tensor)}, blocks=True)

    def bytes_seen(tensor: Tensor) -> memoryview:
        if address(tensor) in device.arenas:
            device.touch("writing a file", {address(tensor)}, set(), blocks=True)
        return bytes_of(tensor)

    def seen(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: DiskStore, block: str, *args: Any) -> Any:
            result = method(self, block, *args)
            device.touch_file(name, self, block, write=name == "put")
            return result

        return call

    methods = [
        (DiskStore, name, seen(name, method)) for name, method in (("put", put), ("read", read), ("mapped", mapped))
    ]
    return [(store, "_fill", filled), (tensor_file, "bytes_of", bytes_seen), *methods]


@contextmanager
def simulated(
    *, streams: bool = True, here: bool = False, slots: int | None = None, without: str | None = None
) -> Iterator[Device]:
    """A context in which models are streamed through a simulated device.

    Args:
        streams: whether the device has streams, as CUDA has; without, copies run in a thread of the host, as on a CPU.
        here: whether copies of host memory are begun by the caller, as on CUDA, and not by a thread.
        slots: of the arena; None for as many as CUDA has where there are streams, and else as a CPU.
        without: one of `Device.sites`, which is left out.
    """
    device = Device(streams=streams, without=without)
    arena = Streaming._arena

    def pool(**more: Any) -> Pool:
        device.pools.append(Pool(device, **more))
        return device.pools[-1]

    def made(self: Streaming) -> Tensor:
        device.give_up()
        return device.hold(arena(self))

    slots = arena_slots(torch.device("cuda" if streams else "cpu")) if slots is None else slots
    changes = [
        *((module, "arena_slots", lambda _: slots) for module in (build, streaming)),
        (streaming, "Copies", partial(Copies, streams=device if streams else None)),
        (copies, "ThreadPoolExecutor", pool),
        (copies, "Future", Futures(device)),
        (ambient, "torch", Torch(device)),
        (Streaming, "_arena", made),
        (build, "RamStore", host_memory(device, here)),
        (_sanitizer, "traceback", Places()),
        *disk(device),
    ]
    with ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(patch.object(owner, name, value))
        stack.enter_context(device.mode)
        yield device
