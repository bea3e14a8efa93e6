"""What does a step of each method cost? Processor time and peak memory, each in processes of their own.

A Llama of 24 million float32 weights, 4 rows of 128 tokens, one thread, no checkpointing. The time is that of the
processor, which other programs on the machine disturb little; the peak is that which the kernel reports, above the
weights, in processes that return what they free (`return_what_is_freed`): the median of some, and their range.
Backpropagation is one step of SGD.

    python -m benchmarks.method_costs --save
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from zo_core import ZeroOrder

from .int4_memory import status
from .offload_memory import return_what_is_freed
from .report import save
from .rivals import alone

SHAPE = {"vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 10}
METHODS: dict[str, dict[str, Any] | None] = {
    "spsa": {},
    "spsa, low_rank": {"noise": "low_rank"},
    "one_block": {"noise": "one_block"},
    "conservative": {"estimator": "conservative"},
    "forward_grad": {"estimator": "forward_grad"},
    "forward_grad, one_block": {"estimator": "forward_grad", "noise": "one_block"},
    "backpropagation": None,
}


def measure(name: str, steps: int, memory: bool) -> tuple[float, float, int]:
    """Seconds of a step, the peak above the weights in bytes, and the number of weights."""
    if memory:
        return_what_is_freed()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_attention_heads=6, max_position_embeddings=128))
    ids = torch.randint(0, SHAPE["vocab_size"], (4, 128))
    settings = METHODS[name]
    step: Callable[[], object]
    if settings is None:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

        def step() -> None:
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    else:
        zo = ZeroOrder(model, lr=1e-4, brake=None, **settings)

        def step() -> None:
            zo.step(lambda: model(input_ids=ids, labels=ids).loss)

    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    step()
    times = []
    for _ in range(steps):
        start = time.process_time()
        step()
        times.append(time.process_time() - start)
    return statistics.median(times), status("VmHWM") - before, sum(p.numel() for p in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5, help="for the time")
    parser.add_argument("--runs", type=int, default=3, help="for the memory")
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, unit, count = [], 0.0, 0
    for name in METHODS:
        seconds, _, count = alone(measure, name, args.steps, False)
        unit = unit or seconds
        peaks = sorted(alone(measure, name, 1, True)[1] / 2**20 for _ in range(args.runs))
        shown = f"{statistics.median(peaks):.0f} ({peaks[0]:.0f} to {peaks[-1]:.0f})"
        rows.append([name, f"{seconds:.2f}", f"{seconds / unit:.2f}", shown])
        print(rows[-1], flush=True)
    title = f"A step of a Llama of {count / 1e6:.0f} million float32 weights, 512 tokens, one thread"
    columns = ["method", "seconds", "in steps of spsa", "MiB above the weights"]
    save("method-costs", title, columns, rows, torch.device("cpu"), write=args.save)


if __name__ == "__main__":
    main()
