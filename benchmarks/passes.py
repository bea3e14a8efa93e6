"""How fast are the passes over weights on a device, eager and in Triton's kernels, beside its memory?

One large tensor shows the rate, many small ones the price of a launch. Bytes are what a pass has to read and write:
the weights once each way, and the momentum in float32.

    python -m benchmarks.passes --dtype float16
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zo_core.noise import Direction, Gaussian, Rademacher
from zo_core.noise.changes import together
from zo_core.rules import Momentum, Sgd, UpdateRule

from .report import save
from .timing import timed

NOISES = {"rademacher": Rademacher(), "gaussian": Gaussian()}


def passes(slots: list[Tensor], noise: str, backend: str) -> dict[str, tuple[Callable[[], object], int]]:
    """By name, a call that does a pass over all slots, and the bytes of one element that it moves."""
    copies = [torch.empty_like(theta) for theta in slots]
    states: list[dict[str, Any]] = [{} for _ in slots]
    size = slots[0].element_size()

    def along(index: int, rounding: int | None) -> Direction:
        return Direction(NOISES[noise], f"layers.{index}", ((7, 1e-3),), rounding, backend)

    def probe() -> None:
        for index, theta in enumerate(slots):
            along(index, None).add_to(theta, out=copies[index])

    def update(rule: UpdateRule) -> None:
        with together():
            for index, theta in enumerate(slots):
                rule.update(theta, states[index], along(index, 5), 1e-6, 0.0)

    return {
        "copy for a probe": (probe, 2 * size),
        "sgd": (lambda: update(Sgd()), 2 * size),
        "momentum": (lambda: update(Momentum()), 2 * size + 8),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--elements", type=int, default=1 << 28, help="in one tensor")
    parser.add_argument("--small", type=int, default=200, help="tensors of 4,096 elements")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    rows = []
    for backend in ("eager", "triton") if device.type == "cuda" else ("eager",):
        for noise in NOISES:
            for shape, count in ((args.elements, 1), (4096, args.small)):
                slots = [torch.ones(shape, dtype=dtype, device=device) for _ in range(count)]
                for name, (run, per_element) in passes(slots, noise, backend).items():
                    run()
                    seconds = statistics.median(timed(run, device) for _ in range(args.rounds))
                    rate = per_element * shape * count / seconds / 1e9
                    rows.append([backend, noise, f"{count} x {shape:,}", name, f"{1e3 * seconds:.3f}", f"{rate:.0f}"])
                del slots
    save(
        f"passes-{args.dtype}",
        f"Passes over {args.dtype} weights, median of {args.rounds}",
        ["backend", "noise", "elements", "", "ms", "GB/s"],
        rows,
        device,
        write=args.save,
    )


if __name__ == "__main__":
    main()
