"""How much memory does it take to train a model from disk?

A checkpoint is written once, one layer at a time, by a separate process. Then new processes train it for a
few steps, sampling their resident memory every 5 ms: opened in place by `from_pretrained_offloaded`, and, for
comparison, loaded as usual. The result is the peak above that of the same process with everything imported and
nothing opened; RssAnon (memory that the kernel cannot reclaim) is also reported.

    python -m benchmarks.offload_memory --save
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch

from .report import save

LEARNING = {"sgd": 1e-7, "momentum": 1e-8}


def llama(layers: int, dtype: torch.dtype, width: int = 1024) -> Any:
    """A Llama with small embeddings and, in its width of 1024, 12.6 M weights a layer; values random."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        vocab_size=4096,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(dtype)


def status() -> dict[str, float]:
    """Resident memory of this process in MB: all of it, and the part that is not backed by a file."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) / 1024 for name in ("VmRSS", "RssAnon")}


#: glibc's name for the size from which an allocation has a mapping of its own.
MMAP_THRESHOLD = -3


def return_what_is_freed() -> None:
    """From now on every larger tensor is returned to the system when it is freed; allocating takes longer.

    Otherwise freed memory stays in the heap, in pieces that fit the next tensor in one run and not in the next: peaks
    differ by tens of megabytes.
    """
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 2**16)


class Peak(threading.Thread):
    """Largest values of `status` while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.values, self.stop = status(), threading.Event()

    def run(self) -> None:
        while not self.stop.wait(0.005):
            self.values = {name: max(value, self.values[name]) for name, value in status().items()}


def train(folder: Path, mode: str, rule: str, tokens: int, steps: int) -> dict[str, float]:
    """Peaks above the imports, in MB, of one run in this process."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer  # noqa: F401 (loaded before the base is read)

    from hf_zo import from_pretrained_offloaded
    from zo_core import ZeroOrder

    torch.zeros(1)
    base = status()
    peak = Peak()
    peak.start()
    with tempfile.TemporaryDirectory() as blocks:
        if mode == "in place":
            model = from_pretrained_offloaded(AutoModelForCausalLM, folder, offload_dir=blocks)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder)
        zo = ZeroOrder(model, lr=LEARNING[rule], rule=rule)
        ids = torch.randint(0, 4096, (1, tokens), generator=torch.Generator().manual_seed(0))
        losses = [zo.step(lambda: model(input_ids=ids, labels=ids).loss).loss for _ in range(steps)]
        zo.flush()
    peak.stop.set()
    peak.join()
    return {name: peak.values[name] - base[name] for name in base} | {"loss": losses[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="for the checkpoint and the blocks; default: a temporary one")
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    parser.add_argument("--run", nargs=2, metavar=("MODE", "RULE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(train(args.folder, *args.run, args.tokens, args.steps)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder)
        llama(args.layers, getattr(torch, args.dtype)).save_pretrained(path, max_shard_size="400MB")
        size = sum(file.stat().st_size for file in path.glob("*.safetensors")) / 2**20
        rows = []
        losses = set()
        for mode, rule in (
            ("in place", "sgd"),
            ("in place", "momentum"),
            ("in memory", "sgd"),
            ("in memory", "momentum"),
        ):
            command = [sys.executable, "-m", "benchmarks.offload_memory", "--folder", folder, "--run", mode, rule]
            command += ["--tokens", str(args.tokens), "--steps", str(args.steps)]
            out = json.loads(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            )
            losses.add((rule, out["loss"]))
            rows.append(
                [f"{mode}, {rule}", f"{out['VmRSS']:.0f}", f"{out['RssAnon']:.0f}", f"{size / out['VmRSS']:.1f}"]
            )
    if len(losses) != 2:
        raise SystemExit(f"in place and in memory disagree: {sorted(losses)}")
    save(
        f"offload-memory-{args.dtype}",
        f"Training a checkpoint of {size:.0f} MiB ({args.layers} layers, {args.dtype}, {args.tokens} tokens, "
        f"{args.steps} steps): peak memory above the imports, MiB; last losses equal",
        ["", "resident", "of it anonymous", "checkpoint ÷ resident"],
        rows,
        torch.device("cpu"),
        write=args.save,
    )


if __name__ == "__main__":
    main()
