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

SUITES = {
    "cpu": (
        ["step_overhead", "--dtype", "float32", "--backends", "eager", "compile"],
        ["step_overhead", "--dtype", "bfloat16", "--backends", "eager"],
        ["drift"],
        ["learning"],
        ["loss_curves"],
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
    ),
    "gpu": (
        ["step_overhead", "--dtype", "float32"],
        ["step_overhead", "--dtype", "bfloat16"],
        ["throughput", "--dtype", "bfloat16"],
        ["offload_throughput", "--tier", "cpu", "--dtype", "float16", "--tokens", "2048", "--layers", "24"],
        ["offload_throughput", "--tier", "cpu", "--dtype", "float16", "--tokens", "64", "--layers", "24"],
        ["offload_throughput", "--tier", "disk", "--dtype", "float16", "--tokens", "2048", "--layers", "24"],
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
