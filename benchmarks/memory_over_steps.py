"""Does the memory of a process stay constant? `ZOTrainer`, `Trainer` and inference alone, over many steps.

Each runs in its own process on the same data, short sequences of random tokens, and records its anonymous memory
(RssAnon) at the end of every step, while a thread samples it every 5 ms for the peak so far. The results are
above the memory of the same process with everything imported and nothing built.

    python -m benchmarks.memory_over_steps --save
    python -m benchmarks.memory_over_steps --size small --steps 200
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .offload_memory import Peak, status
from .report import save

WAYS = {"inference": "inference alone", "zo": "ZOTrainer", "backprop": "Trainer, AdamW"}
SHAPES = ("llama", "bert")

#: Steps whose memory is in the table, if a run has as many.
MARKS = (1, 10, 50, 100, 200, 400, 600, 800, 1000, 1200, 1400, 1600, 1800, 2000)


def build(shape: str, size: str) -> Any:
    """A Llama of 110 M parameters or BERT base, float32, random; ``size="small"`` has 0.2 M."""
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    small = size == "small"
    common = {
        "hidden_size": 64 if small else 768,
        "num_hidden_layers": 2 if small else 12,
        "num_attention_heads": 4 if small else 12,
        "vocab_size": 1000 if small else 32000,
        "max_position_embeddings": 512,
    }
    if shape == "llama":
        config = LlamaConfig(**common, intermediate_size=176 if small else 2048, tie_word_embeddings=True)
        return LlamaForCausalLM(config)
    config = BertConfig(**common, intermediate_size=256 if small else 3072, num_labels=2)
    return BertForSequenceClassification(config)


def rows(shape: str, vocabulary: int, tokens: int, count: int = 256) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (count, tokens), generator=generator)
    labels = ids if shape == "llama" else torch.arange(count) % 2
    mask = torch.ones(tokens, dtype=torch.int64)
    return [{"input_ids": i, "attention_mask": mask, "labels": y} for i, y in zip(ids, labels, strict=True)]


def infer(model: Any, data: list[dict[str, Any]], batch: int, steps: int, after: Callable[[], object]) -> None:
    model.eval()
    batches = [data[at : at + batch] for at in range(0, len(data), batch)]
    for step in range(steps):
        chosen = batches[step % len(batches)]
        with torch.no_grad():
            model(**{name: torch.stack([row[name] for row in chosen]) for name in chosen[0]}, use_cache=False)
        after()


def train(
    way: str, model: Any, data: list[dict[str, Any]], batch: int, steps: int, after: Callable[[], object]
) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from hf_zo import ZOTrainer

    class After(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            after()

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=1e-6,
            use_cpu=True,
            dataloader_pin_memory=False,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
        )
        trainer = ZOTrainer if way == "zo" else Trainer
        trainer(model=model, args=args, train_dataset=data, callbacks=[After()]).train()


def run(shape: str, way: str, args: argparse.Namespace, steps: int) -> list[tuple[float, float]]:
    """Memory at the end of every step, and the peak up to there, in MB above the imports."""
    import hf_zo  # noqa: F401

    torch.zeros(1)
    base = status()["RssAnon"]
    peak = Peak()
    peak.start()
    seen: list[tuple[float, float]] = []

    def after() -> None:
        now = status()["RssAnon"] - base
        seen.append((now, max(now, peak.values["RssAnon"] - base)))

    model = build(shape, args.size)
    data = rows(shape, model.config.vocab_size, args.tokens)
    if way == "inference":
        infer(model, data, args.batch, steps, after)
    else:
        train(way, model, data, args.batch, steps, after)
    peak.stop.set()
    peak.join()
    return seen


def measured(shape: str, way: str, args: argparse.Namespace, steps: int) -> list[tuple[float, float]]:
    """`run` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory_over_steps", "--run", shape, way, "--steps", str(steps)]
    command += ["--size", args.size, "--tokens", str(args.tokens), "--batch", str(args.batch)]
    root = Path(__file__).parent.parent
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=root, env=dict(os.environ))
    return [(now, peak) for now, peak in json.loads(result.stdout.splitlines()[-1])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=["base", "small"], default="base", help="110 M parameters, or 0.2 M")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--backprop-steps", type=int, help="fewer for Trainer, which is slow; default: all")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(run(*args.run, args, args.steps)))
        return
    columns: dict[str, list[tuple[float, float]]] = {}
    for shape in args.shapes:
        for way, name in WAYS.items():
            steps = min(args.steps, args.backprop_steps or args.steps) if way == "backprop" else args.steps
            columns[f"{shape}, {name}"] = measured(shape, way, args, steps)
    marks = sorted({mark for mark in MARKS if mark <= args.steps} | {args.steps})
    table = [[str(m), *(f"{c[m - 1][0]:.0f}" if m <= len(c) else "" for c in columns.values())] for m in marks]
    table.append(["peak", *(f"{column[-1][1]:.0f}" for column in columns.values())])
    save(
        f"memory-over-steps-{args.size}",
        f"Anonymous memory above the imports at the end of some steps, MB; {args.size} models in float32, "
        f"{args.batch} × {args.tokens} tokens",
        ["step", *columns],
        table,
        torch.device("cpu"),
        write=args.save,
    )


if __name__ == "__main__":
    main()
