"""How fast do bytes move between host memory and the device, one way and both ways at once?

python -m benchmarks.link --save
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from functools import partial

import torch

from .report import save
from .timing import timed


def link_rates(device: torch.device, size: int = 1 << 28, rounds: int = 5) -> dict[str, float]:
    """Bytes per second of copies of ``size`` bytes from and to page-locked memory; the best of ``rounds``.

    "both ways, together" counts the bytes of both directions.
    """
    cuda = device.type == "cuda"
    out, back = (torch.empty(size, dtype=torch.uint8, pin_memory=cuda) for _ in range(2))
    there, from_there = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    streams = [torch.cuda.Stream(device) if cuda else None for _ in range(2)]

    def copy(*ways: int) -> None:
        for way in ways:
            target, source = ((there, out), (back, from_there))[way]
            with torch.cuda.stream(streams[way]) if cuda else nullcontext():
                target.copy_(source, non_blocking=cuda)

    def seconds(*ways: int) -> float:
        copy(*ways)  # warms up
        return min(timed(partial(copy, *ways), device) for _ in range(rounds))

    return {
        "host to device": size / seconds(0),
        "device to host": size / seconds(1),
        "both ways, together": 2 * size / seconds(0, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    args = parser.parse_args()
    device = torch.device(args.device)
    rates = link_rates(device, args.megabytes << 20)
    save(
        "link",
        f"Copies of {args.megabytes} MiB between page-locked host memory and the device",
        ["", "GB/s"],
        [[name, f"{rate / 1e9:.1f}"] for name, rate in rates.items()],
        device,
        write=args.save,
    )


if __name__ == "__main__":
    main()
