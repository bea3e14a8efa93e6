"""Fine-tune a language model with forward passes only, in under three minutes on two CPU cores.

A small causal language model learns English from Python's own documentation by backpropagation;
then it is fine-tuned on another domain, the source code of the standard library, once with
`ZOTrainer` (no backward pass, memory of inference) and once with `Trainer`, each in its own process,
so that neither is affected by memory that the other has used.

    python examples/quickstart.py
    python examples/quickstart.py --model facebook/opt-125m --dataset wikitext --dataset-config wikitext-2-raw-v1

With --model and --dataset (network needed), that model is fine-tuned on that data instead.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import math
import multiprocessing
import pydoc_data.topics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that a clone works before it is installed

from hf_zo import ZOTrainer, ZOTrainingArguments

Rows = list[dict[str, torch.Tensor]]
Row = dict[str, float]

LENGTH = 128
SOURCES = "argparse ast dataclasses difflib functools heapq logging pathlib pickle random statistics tarfile typing"


def rows_of(tokens: list[int], length: int = LENGTH) -> Rows:
    """Consecutive pieces, as a data set."""
    pieces = torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def shuffled(rows: Rows) -> Rows:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return [rows[i] for i in order]


def small_model() -> PreTrainedModel:
    """A Llama on bytes, 246,240 parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=256,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def offline(steps: int) -> tuple[PreTrainedModel, Rows]:
    """A model trained on documentation, and source code as the domain to adapt to."""
    english = rows_of(list("\n".join(pydoc_data.topics.topics.values()).encode()))
    code = rows_of(list("\n".join(inspect.getsource(importlib.import_module(m)) for m in SOURCES.split()).encode()))
    model = small_model()
    print(f"Training {model.num_parameters():,} parameters on {len(english) * LENGTH:,} bytes of English …")
    args = arguments(TrainingArguments, steps, 2e-3, lr_scheduler_type="constant")
    quiet(Trainer(model, args, train_dataset=english)).train()
    return model, shuffled(code)


def from_hub(name: str, dataset: str, config: str | None) -> tuple[PreTrainedModel, Rows]:
    """A model and a text data set of the Hugging Face Hub."""
    from datasets import load_dataset

    tokenizer = AutoTokenizer.from_pretrained(name)
    text = "\n".join(load_dataset(dataset, config, split="train[:5000]")["text"])
    return AutoModelForCausalLM.from_pretrained(name), shuffled(rows_of(tokenizer(text)["input_ids"]))


def arguments(cls: type, steps: int, lr: float, **more: object) -> TrainingArguments:
    return cls(
        output_dir=str(Path(tempfile.gettempdir()) / "zo-quickstart"),
        max_steps=steps,
        learning_rate=lr,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=16,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        **more,
    )


def in_use() -> tuple[float, float]:
    """Memory for data now, and the peak of everything so far, in MiB.

    On a GPU these are PyTorch's own numbers. On a CPU they are the kernel's (Linux only): anonymous memory, and a
    peak that also includes code and files.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20, torch.cuda.max_memory_reserved() / 2**20
    if sys.platform != "linux":
        return math.nan, math.nan
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 2**10, int(fields["VmHWM"].split()[0]) / 2**10


class Memory:
    """Peak memory of a ``with`` block on top of that before, sampled every few milliseconds."""

    def __enter__(self) -> Memory:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        elif sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        self.before = self.highest = in_use()
        self.ended = threading.Event()
        self.watcher = threading.Thread(target=self.watch)
        self.watcher.start()
        return self

    def watch(self) -> None:
        while not self.ended.wait(0.003):
            self.highest = tuple(map(max, self.highest, in_use()))

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.watcher.join()
        self.data, self.peak = (high - low for low, high in zip(self.before, self.highest, strict=True))


def quiet(trainer: Trainer) -> Trainer:
    """Without the callback that prints every log."""
    trainer.remove_callback(PrinterCallback)
    return trainer


def trained(name: str, start: Path, steps: int, lr: float) -> Row:
    """Trains the model stored in ``start``; returns a row of the table."""
    model, rows = torch.load(start, weights_only=False)
    cls, args = (ZOTrainer, ZOTrainingArguments) if name == "ZOTrainer" else (Trainer, TrainingArguments)
    trainer = quiet(cls(model, arguments(args, steps, lr), train_dataset=rows[64:], eval_dataset=rows[:64]))
    before = trainer.evaluate()["eval_loss"]
    begin = time.perf_counter()
    with Memory() as memory:
        trainer.train()
    seconds = time.perf_counter() - begin
    after = trainer.evaluate()["eval_loss"]
    return {"before": before, "after": after, "seconds": seconds, "data": memory.data, "peak": memory.peak}


def in_a_process_of_its_own(function: Callable[..., Row], *args: object) -> Row:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600, help="zeroth-order steps, two forwards each")
    parser.add_argument("--pretraining-steps", type=int, default=300)
    parser.add_argument("--model", help="a causal language model of the Hub, instead of the small one")
    parser.add_argument("--dataset", help="a text data set of the Hub, needed with --model")
    parser.add_argument("--dataset-config")
    parser.add_argument("--lr", type=float, help="learning rate; default 3e-4 for the small model, 1e-6 with --model")
    args = parser.parse_args()
    if (args.model is None) != (args.dataset is None):
        parser.error("--model and --dataset go together")
    hub = args.model, args.dataset, args.dataset_config
    start = from_hub(*hub) if args.model else offline(args.pretraining_steps)

    print(f"Fine-tuning on the new domain: {args.steps} zeroth-order steps, {args.steps // 6} of backpropagation …")
    runs = {
        "ZOTrainer": (args.steps, args.lr or (1e-6 if args.model else 3e-4)),
        "Trainer": (args.steps // 6, 1e-5 if args.model else 1e-3),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "start.pt"
        torch.save(start, path)
        table = {name: in_a_process_of_its_own(trained, name, path, *run) for name, run in runs.items()}

    before = table["ZOTrainer"]["before"]
    print(f"\nHeld-out loss before: {before:.3f} (perplexity {math.exp(before):.2f})\n")
    print(f"{'':10}{'loss after':>12}{'time':>8}{'forwards/s':>12}{'extra memory':>14}{'extra peak':>12}")
    for name, row in table.items():
        forwards = 2 * args.steps if name == "ZOTrainer" else args.steps // 6
        numbers = f"{row['after']:>12.3f}{row['seconds']:>6.0f} s{forwards / row['seconds']:>12.0f}"
        print(f"{name:10}{numbers}{row['data']:>10.0f} MiB{row['peak']:>8.0f} MiB")
    print(
        "\n'Extra' is on top of what evaluating the model took: memory for data, and the peak of everything, code and\n"
        "files included. Backpropagation learns more per second where it fits; ZOTrainer is for where it does not: it\n"
        "needs no gradients, optimizer state or stored activations."
    )


if __name__ == "__main__":
    main()
