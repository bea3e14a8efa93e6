"""What does `reuse=True` save, which computes the layers before the first one that moves once a step?

The Llama of `benchmarks.method_costs` (24 million float32 weights, ten layers, 512 tokens, one thread), with and
without that, each in a process of its own: processor time of a step, how many layers it computes, and peak memory above
the weights. Losses are the same bits; the command fails if they are not.

    python -m benchmarks.feature_reuse --save
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from zo_core import ZeroOrder

from .int4_memory import status
from .method_costs import SHAPE
from .report import save

#: Gives freed tensors back to the system at once. The peak is then that of what is in use, and not of the gaps between.
MMAP = {"MALLOC_MMAP_THRESHOLD_": "131072"}

#: Steps before those that are measured: streamed layers are checked in the first, second, fourth and eighth step.
FIRST = 4
#: What is trained, by the beginnings of names; settings; and steps, so that every block has its turn.
LAST = ("model.layers.8.", "model.layers.9.")
CASES: dict[str, tuple[tuple[str, ...], dict[str, Any], int]] = {
    "head, 1 direction": (("lm_head",), {}, 3),
    "head, 8 directions": (("lm_head",), {"num_probes": 8}, 3),
    "last 2 layers, 8 directions": (LAST, {"num_probes": 8}, 3),
    "last 2 layers, 8 directions, streamed": (LAST, {"num_probes": 8, "offload": "cpu"}, 3),
    "all, one_block": (("",), {"noise": "one_block"}, 13),
}


def measure(name: str, reuse: bool) -> tuple[float, float, int, list[float]]:
    """Seconds of a step, layers that it computes, the peak above the weights in bytes, and the losses."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(**SHAPE, num_attention_heads=6, max_position_embeddings=128, use_cache=False)
    model = LlamaForCausalLM(config)
    trained, settings, steps = CASES[name]
    for parameter, weight in model.named_parameters():
        weight.requires_grad_(parameter.startswith(trained))
    ids = torch.randint(0, SHAPE["vocab_size"], (4, 128))
    zo = ZeroOrder(model, lr=1e-4, brake=None, seed=0, reuse=reuse, **settings)
    calls: Counter[str] = Counter()
    forward = LlamaDecoderLayer.forward

    def counted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls["layers"] += 1
        return forward(self, *args, **kwargs)

    LlamaDecoderLayer.forward = counted
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    losses, times = [], []
    first = max(FIRST, steps)
    for step in range(first + steps):
        if step == first:
            calls.clear()
        start = time.process_time()
        losses.append(zo.step(lambda: model(input_ids=ids, labels=ids).loss).loss)
        times.append(time.process_time() - start)
    middle = statistics.mean if steps > 3 else statistics.median
    return middle(times[first:]), calls["layers"] / steps, status("VmHWM") - before, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--without", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, not args.without)))
        return
    rows = []
    for name in CASES:
        command = [sys.executable, "-m", "benchmarks.feature_reuse", "--one", name]
        how: dict[str, Any] = {"check": True, "capture_output": True, "env": {**os.environ, **MMAP}}
        runs = [subprocess.run([*command, *more], **how) for more in (["--without"], [])]
        (old, all_layers, high, one), (new, layers, peak, other) = (json.loads(run.stdout) for run in runs)
        if one != other:
            raise SystemExit(f"{name}: the losses differ, {one} without and {other} with reuse")
        numbers = f"{old:.2f}", f"{new:.2f}", f"{old / new:.2f}", f"{all_layers:.0f}", f"{layers:.1f}"
        rows.append([name, *numbers, f"{high / 2**20:.0f}", f"{peak / 2**20:.0f}"])
        print(rows[-1], flush=True)
    columns = ["what moves", "seconds, each probe computes all", "seconds, once", "times faster"]
    columns += ["layers computed, all", "layers computed, once", "MiB above the weights, all", "MiB, once"]
    title = "A step of a Llama of ten layers whose early layers do not move, 512 tokens, one thread"
    save("feature-reuse", title, columns, rows, torch.device("cpu"), write=args.save)


if __name__ == "__main__":
    main()
