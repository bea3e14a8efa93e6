"""Runs the benchmarks one after the other, each in its own process, and draws the plots.

    python -m benchmarks --suite cpu        # about an hour on two otherwise idle cores
    python -m benchmarks --suite gpu
    python -m benchmarks --plots            # only draws what is in benchmarks/results

Tables (Markdown and JSON, named by model, hardware and date) go to ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from .plots import draw

#: Models of `offload_throughput` for a GPU.
LARGE = ["--dtype", "float16", "--width", "4096", "--layers", "4", "--rounds", "3"]

SUITES = {
    "cpu": (
        ["step_overhead", "--dtype", "float32", "--backends", "eager", "compile"],
        ["step_overhead", "--dtype", "bfloat16", "--backends", "eager"],
        ["learning"],
        ["offload_memory"],
        ["offload_throughput", "--tier", "disk", "--tokens", "512"],
        ["offload_throughput", "--tier", "disk", "--tokens", "16"],
        ["offload_throughput", "--tier", "cpu", "--tokens", "512"],
        ["int4_memory"],
        ["int4_learning"],
        ["replay"],
        ["estimate"],
        ["throughput", "--tokens", "64", "512"],
        ["low_rank_learning"],
        ["sparse_learning"],
        ["hybrid"],
        ["generation"],
    ),
    "gpu": (
        ["link", "--megabytes", "512"],
        ["passes"],
        ["step_overhead", "--dtype", "float32", "--backends", "eager", "triton"],
        ["step_overhead", "--dtype", "bfloat16", "--backends", "eager", "triton"],
        ["throughput", "--dtype", "bfloat16"],
        ["opt_streamed", "--sizes", "1.3b", "6.7b", "13b"],
        ["opt_streamed", "--sizes", "13b", "--layers", "4", "--rule", "momentum"],
        ["int4_streamed", "--size", "6.7b", "--layers", "8"],
        # Blocks of 403 MB: in smaller ones a GPU waits for Python. The reference draws its normals on the host.
        ["offload_throughput", "--tier", "cpu", *LARGE, "--tokens", "2048"],
        ["offload_throughput", "--tier", "cpu", *LARGE, "--tokens", "64"],
        ["offload_throughput", "--tier", "disk", *LARGE, "--tokens", "2048"],
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=SUITES)
    parser.add_argument("--plots", action="store_true", help="draw the plots, and run nothing without --suite")
    args = parser.parse_args()
    if not args.suite and not args.plots:
        parser.error("write --suite cpu, --suite gpu, or --plots")
    failed = []
    for name, *options in SUITES.get(args.suite, ()):
        command = [sys.executable, "-m", f"benchmarks.{name}", *options, "--save"]
        print(f"\n$ {' '.join(command[1:])}", flush=True)
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    for path in draw():
        print(f"drawn: {path}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
