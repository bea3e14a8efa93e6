"""How fast is replaying a log, compared with the training that wrote it?

Trains a Llama of 54.9 M parameters for a few steps with a seed log, then replays the log on the base
model: fused (all steps are applied to each piece of a slot while it is in the cache), and for comparison
step by step over the whole model. All three end with the same weights, which is checked.

    python -m benchmarks.replay --dtype float32 --save

Passes over the weights per step: training reads them for two probes and reads and writes them for the
update; replay step by step reads and writes them once; fused replay once for the whole log.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from zo_core import SeedLog, SeedLogWriter, ZeroOrder
from zo_core.seedlog import engine_for, fingerprint
from zo_core.seedlog.replay import apply_steps

from .report import save
from .step_overhead import llama_60m
from .timing import clock_of, timed, unit_of


def base(dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_60m()).to(device, dtype).eval()


def measure(
    dtype: torch.dtype, device: torch.device, tokens: int, steps: int, rounds: int, path: Path
) -> tuple[dict[str, float], int]:
    """Seconds per step of each way, and the size of the log."""
    model = base(dtype, device)
    ids = torch.randint(0, 32000, (1, tokens), device=device)
    zo = ZeroOrder(model, lr=1e-6, eps=1e-3)
    log = SeedLogWriter.attach(zo, path)
    spent = partial(timed, device=device, clock=clock_of(device))
    training = [spent(lambda: zo.step(lambda: model(input_ids=ids, labels=ids).loss)) for _ in range(steps)]
    log.close()
    wanted, read = fingerprint(zo)["digest"], SeedLog.read(path)
    keys = list(read.header["base"]["slots"])
    seconds: dict[str, list[float]] = {"replay, step by step": [], "replay, fused": []}
    for _ in range(rounds):
        for name, times in seconds.items():
            engine = engine_for(base(dtype, device), read)
            parts = [read.steps] if name.endswith("fused") else [[entry] for entry in read.steps]
            times.append(spent(lambda e=engine, p=parts: [apply_steps(e, keys, part) for part in p]) / steps)
            assert fingerprint(engine)["digest"] == wanted
    per_step = {"training": statistics.median(training)}
    return per_step | {name: statistics.median(times) for name, times in seconds.items()}, path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    args = parser.parse_args()
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "seedlog.zo"
        seconds, size = measure(getattr(torch, args.dtype), device, args.tokens, args.steps, args.rounds, path)
    base_time = seconds["training"]
    rows = [[name, f"{1 / each:.2f}", f"{base_time / each:.1f}"] for name, each in seconds.items()]
    save(
        f"replay-llama55m-{args.dtype}",
        f"Replay of {args.steps} steps, Llama 54.9 M, {args.tokens} tokens, {args.dtype}, log of {size:,} bytes",
        ["", f"steps / {unit_of(device)}", "× training"],
        rows,
        device,
        write=args.save,
    )


if __name__ == "__main__":
    main()
