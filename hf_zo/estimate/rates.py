"""Measures how fast this machine moves bytes and multiplies matrices."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rates:
    """The rates that bound the time of a step; None if a rate is not known.

    Attributes:
        link: bytes per second between host memory and device, one way.
        disk: bytes per second between disk and host memory.
        flops: floating point operations per second in the dtype of the weights.
    """

    link: float | None = None
    disk: float | None = None
    flops: float | None = None


def measure_rates(device: torch.device, dtype: torch.dtype, folder: str | None = None) -> Rates:
    """Measures each rate as the best of three tries, in about one or two seconds.

    Args:
        device: the device where the model computes.
        dtype: dtype of the weights.
        folder: a folder on the disk for the blocks; None takes the folder of temporary files.

    Returns:
        All three rates. The file's pages are dropped from the page cache before it is read, as far as
        the kernel follows the advice; a virtual disk may still have its own cache.
    """
    host = torch.empty(1 << 26, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty_like(host, device=device, pin_memory=False)
    link = host.numel() / _best(lambda: target.copy_(host, non_blocking=True), device)
    size = 4096 if device.type == "cuda" else 1024
    a = torch.ones(size, size, dtype=dtype, device=device)
    flops = 2 * size**3 / _best(lambda: a @ a, device)
    return Rates(link, _disk_rate(host.cpu(), folder), flops)


def _disk_rate(data: torch.Tensor, folder: str | None) -> float:
    buffer = data.numpy().data
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(buffer)
        file.flush()
        os.fsync(file.fileno())

        def read() -> None:
            done = 0
            while done < len(buffer):
                done += os.preadv(file.fileno(), [buffer[done:]], done)

        times = []
        for _ in range(3):
            os.posix_fadvise(file.fileno(), 0, len(buffer), os.POSIX_FADV_DONTNEED)
            start = time.perf_counter()
            read()
            times.append(time.perf_counter() - start)
    return len(buffer) / min(times)


def _best(run: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(4):  # the first one warms up
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])
