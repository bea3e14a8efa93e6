"""Is `zo-estimate` accurate? Compares its numbers with the peaks of runs in separate processes.

Each process trains the same checkpoint for a few steps, resident or from disk, and samples its anonymous
memory (RssAnon) every 5 ms. The result is the peak above that of the same process with everything imported, and
a model of a few kilobytes trained, but nothing opened. Each run is measured with the defaults, and, to determine
how much freed memory glibc keeps, with MALLOC_MMAP_THRESHOLD_=65536, which makes it return large pieces. The estimate
counts what is in use and what heaps keep within a block.

    python -m benchmarks.estimate --save
    python -m benchmarks.estimate --hidden 1024 --layers 32 --vocabulary 4096 --steps 3 --places "from disk" --save
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from hf_zo.estimate import Workload, estimate, skeleton
from zo_core import ZeroOrder, ZOConfig

from .offload_memory import LEARNING, Peak, status
from .report import save


@dataclass(frozen=True)
class Case:
    """One run: where the layers are, the rule, the directions per step, and how many last layers have gradients."""

    place: str
    rule: str = "sgd"
    num_probes: int = 1
    gradients: int = 0

    @property
    def name(self) -> str:
        hybrid = f", backprop in {self.gradients} layers" if self.gradients else ""
        return f"{self.place}, {self.rule}, {self.num_probes} probe{'s' * (self.num_probes > 1)}{hybrid}"

    def config(self, layers: int) -> ZOConfig:
        """The settings for a model of so many layers."""
        last = [f"model.layers.{index}" for index in range(layers - self.gradients, layers)]
        names = ("model.norm", *last) if self.gradients else None
        return ZOConfig(rule=self.rule, num_probes=self.num_probes, backprop=names, backprop_lr=1e-6)


CASES = (
    Case("resident"),
    Case("resident", "momentum"),
    Case("from disk"),
    Case("from disk", "momentum"),
    Case("from disk", "sgd", 2),
    Case("resident", gradients=2),
    Case("from disk", gradients=2),
)


def write_checkpoint(folder: Path, hidden: int, layers: int, vocabulary: int) -> None:
    """A Llama in float32 with 12 * hidden^2 weights a layer, embeddings tied; values random."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        vocab_size=vocabulary,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def predicted(folder: Path, case: Case, tokens: int) -> dict[str, int]:
    """Parts of the memory that the estimate names, in bytes."""
    model = skeleton(str(folder), torch.float32)
    config = case.config(model.config.num_hidden_layers)
    work = Workload(batch_size=1, length=tokens, device="cpu", config=config)
    rows = {row.name: row for row in estimate(model, work)}
    row = rows[f"all weights, {case.place}"]
    return {**row.parts, "writing": row.host}


def run(folder: Path, case: Case, tokens: int, steps: int) -> int:
    """Peak of RssAnon above the imports, in bytes, of a run in this process."""
    from transformers import (  # loaded before the base is read
        AutoConfig,
        AutoModelForCausalLM,
        LlamaForCausalLM,  # noqa: F401
        Trainer,  # noqa: F401
    )

    from hf_zo import from_pretrained_offloaded

    small = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    layers = AutoConfig.from_pretrained(folder).num_hidden_layers
    streamed = [f"model.layers.{index}" for index in range(layers - case.gradients)]
    names = ("1",) if case.gradients else ()
    ZeroOrder(small, lr=0.0, backprop=names).step(lambda: small(torch.ones(64, 64)).mean())
    peak = Peak()
    base = status()
    peak.start()
    with tempfile.TemporaryDirectory(dir=folder) as blocks:
        if case.place == "resident":
            model = AutoModelForCausalLM.from_pretrained(folder)
        else:
            model = from_pretrained_offloaded(AutoModelForCausalLM, folder, offload_dir=blocks, blocks=streamed)
        model.config.use_cache = False
        zo = ZeroOrder(model, case.config(layers), lr=LEARNING[case.rule])
        ids = torch.randint(0, 4096, (1, tokens), generator=torch.Generator().manual_seed(0))
        inputs = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
        for _ in range(steps):
            zo.step(lambda: model(**inputs).loss)
        zo.flush()
    peak.stop.set()
    peak.join()
    return int((peak.values["RssAnon"] - base["RssAnon"]) * 2**20)


def measured(folder: Path, case: Case, tokens: int, steps: int, keep: bool) -> int:
    """`run` in a process of its own; ``keep`` lets glibc keep freed memory, as it does by default."""
    command = [sys.executable, "-m", "benchmarks.estimate", "--run", str(folder), case.place, case.rule]
    command += [str(case.num_probes), str(case.gradients), "--tokens", str(tokens), "--steps", str(steps)]
    root = Path(__file__).parent.parent
    environment = dict(os.environ) if keep else os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root, env=environment)
    return int(json.loads(result.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=16000)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--places", nargs="+", choices=["resident", "from disk"], default=["resident", "from disk"])
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    parser.add_argument("--run", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        folder, place, rule, probes, gradients = args.run
        print(run(Path(folder), Case(place, rule, int(probes), int(gradients)), args.tokens, args.steps))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        write_checkpoint(path, args.hidden, args.layers, args.vocabulary)
        rows = []
        for case in (case for case in CASES if case.place in args.places):
            said = sum(predicted(path, case, args.tokens).values())
            used, kept = (measured(path, case, args.tokens, args.steps, keep) for keep in (False, True))
            rows.append(
                [case.name, f"{said / 1e6:.0f}", f"{kept / 1e6:.0f}", f"{said / kept:.3f}", f"{used / 1e6:.0f}"]
            )
        size = sum(file.stat().st_size for file in path.glob("*.safetensors")) / 1e6
    save(
        f"estimate-{size:.0f}mb",
        f"`zo-estimate` and peaks of RssAnon above the imports, MB; a checkpoint of {size:.0f} MB in float32, "
        f"{args.layers} layers, {args.tokens} tokens, {args.steps} steps",
        ["", "estimate", "measured", "estimate ÷ measured", "measured, glibc keeps nothing"],
        rows,
        torch.device("cpu"),
        write=args.save,
    )


if __name__ == "__main__":
    main()
