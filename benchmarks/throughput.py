"""How close does a zeroth-order step come to plain inference?

Tokens per second of a step, divided by those of the same forwards with no training at all: full-rank and
low-rank directions, and low-rank ones with 8 probes in a step, one after another and stacked in one forward. Side
by side in one run, interleaved so that a noisy machine disturbs all alike, medians over the rounds.

    python -m benchmarks.throughput --tokens 64 512 4096 --save

"stacked forward" is the gain of one forward of 16 copies of the batch over 16 forwards, without training: the most
that stacked probes could gain, and the last column is the fraction of it that they reach. Both are measured up to 64
tokens: the logits of 16 copies of many tokens would fill the memory. "low rank, stacked" has the two sides of one
direction in one forward. On a CPU the seconds are those of the processor, since others may use the machine.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

import torch
from transformers import LlamaForCausalLM

from zo_core import LowRank, ZeroOrder

from .report import save
from .step_overhead import llama_60m
from .timing import clock_of, medians, unit_of

BOUND, STACKED = "stacked forward", "low rank, 8 probes, stacked"
#: Tokens up to which batches are stacked.
MOST_STACKED = 64
#: Settings of each contender, and the forwards in one of its steps.
CONTENDERS: dict[str, tuple[dict[str, object], int]] = {
    "full rank (rademacher)": ({"noise": "rademacher"}, 2),
    "low rank": ({"noise": LowRank()}, 2),
    "low rank, stacked": ({"noise": LowRank(), "stack_probes": True}, 2),
    "low rank, 8 probes": ({"noise": LowRank(), "num_probes": 8}, 16),
    STACKED: ({"noise": LowRank(), "num_probes": 8, "stack_probes": True}, 16),
}


def measure(
    tokens: int, device: torch.device, dtype: torch.dtype, rounds: int, contenders: list[str]
) -> dict[str, float]:
    """Tokens per second of each contender, by name."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_60m()).to(device, dtype).eval()
    ids = torch.randint(0, 32000, (1, tokens), device=device)
    many = ids.repeat(16, 1)

    @torch.no_grad()
    def forwards(batch: torch.Tensor, count: int) -> None:
        for _ in range(count):
            model(input_ids=batch, labels=batch).loss.item()

    runs: dict[str, tuple[Callable[[], object], int]] = {"forwards alone": (lambda: forwards(ids, 2), 2)}
    if tokens <= MOST_STACKED:
        runs[BOUND] = (lambda: forwards(many, 1), 16)
    for name, (settings, count) in ((name, CONTENDERS[name]) for name in contenders):
        if name == STACKED and BOUND not in runs:
            continue
        # Each engine has a model of its own: the same weights in memory, with hooks of its own.
        twin = LlamaForCausalLM(llama_60m()).to(device, dtype).eval()
        twin.load_state_dict(model.state_dict())
        zo = ZeroOrder(twin, lr=1e-7, eps=1e-3, **settings)  # type: ignore[arg-type]
        runs[name] = (lambda zo=zo, twin=twin: zo.step(lambda: twin(input_ids=ids, labels=ids).loss), count)
    for run, _ in runs.values():  # twice: the first stacked step compares itself with separate probes
        run()
        run()
    seconds = medians({name: run for name, (run, _) in runs.items()}, rounds, device, clock_of(device))
    return {name: tokens * runs[name][1] / value for name, value in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 512, 4096])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    args = parser.parse_args()
    device = torch.device(args.device)
    print(f"load of the machine before: {os.getloadavg()[0]:.2f}")
    rows = []
    for tokens in args.tokens:
        speeds = measure(tokens, device, getattr(torch, args.dtype), args.rounds, args.contenders)
        base, bound = speeds["forwards alone"], speeds.get(BOUND)
        for name, speed in speeds.items():
            reached = f"{speed / bound:.2f}" if bound is not None and name == STACKED else ""
            rows.append([str(tokens), name, f"{speed:.0f}", f"{speed / base:.2f}", reached])
    title = f"Throughput of a step, Llama 54.9 M, {args.dtype}, median of {args.rounds} interleaved rounds"
    columns = ["tokens", "", f"tokens / {unit_of(device)}", "÷ forwards alone", "÷ stacked forward"]
    save(
        f"throughput-llama55m-{'-'.join(map(str, args.tokens))}tokens-{args.dtype}",
        title,
        columns,
        rows,
        device,
        write=args.save,
    )


if __name__ == "__main__":
    main()
