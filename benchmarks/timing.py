"""Seconds of work on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def synchronise(device: torch.device) -> None:
    """Waits for a CUDA device; a CPU has nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds of the processor on a CPU, since others may use the machine; of the wall on other devices."""
    return time.process_time if device.type == "cpu" else time.perf_counter


def unit_of(device: torch.device) -> str:
    """What `clock_of` counts, as the head of a column."""
    return "processor s" if device.type == "cpu" else "seconds"


def timed(run: Callable[[], object], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call, from an idle device to an idle device."""
    synchronise(device)
    start = clock()
    run()
    synchronise(device)
    return clock() - start


def medians(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each run. They take turns, so that what else the machine does meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(timed(run, device, clock))
    return {name: statistics.median(values) for name, values in times.items()}
