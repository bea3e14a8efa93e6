"""Fine-tune a text classifier with forward passes only, in under three minutes on two CPU cores.

A small BERT learns by backpropagation which of 13 texts a passage is from: topics of Python's documentation and
modules of its standard library. Then it learns something new from other texts, whether a passage is documentation or
source code: once with `ZOTrainer` (no backward pass) and once with `Trainer`, each in a process of its own, so that
neither is affected by memory that the other has used.

    python examples/quickstart.py
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
import weakref
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BertConfig, BertForSequenceClassification, ProgressCallback, Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that a clone works before it is installed

from hf_zo import ZOTrainer, ZOTrainingArguments, activation_adapter

Rows = list[dict[str, Any]]
Row = dict[str, float]

TOPICS = 12
MODULES = (
    "argparse ast dataclasses difflib functools heapq inspect logging pathlib pickle random statistics tarfile typing"
)
LENGTH = 32
VOCABULARY = 1000
HELD_OUT = 512


# The texts


def passages() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Passages of `LENGTH` tokens, of each topic of the documentation and of each module."""
    english = sorted(pydoc_data.topics.topics.values(), key=len)[-TOPICS:]
    code = [inspect.getsource(importlib.import_module(name)) for name in MODULES.split()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    pairs = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(english + code, pairs)

    def cut(text: str) -> torch.Tensor:
        tokens = torch.tensor(tokenizer.encode(text).ids)
        return tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)

    return [cut(text) for text in english], [cut(text) for text in code]


def shuffled(classes: list[torch.Tensor]) -> Rows:
    rows = [{"input_ids": row, "labels": label} for label, part in enumerate(classes) for row in part]
    return [rows[index] for index in torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def equally_many(classes: list[torch.Tensor]) -> list[torch.Tensor]:
    order = torch.Generator().manual_seed(0)
    count = min(map(len, classes))
    return [part[torch.randperm(len(part), generator=order)[:count]] for part in classes]


# The model


def classifier(labels: int) -> BertForSequenceClassification:
    """A BERT of 260,000 parameters."""
    shape = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, num_labels=labels, **shape, **none)
    )


def pretrained(steps: int) -> tuple[BertForSequenceClassification, Rows]:
    """A model with a new head that has learnt from every other text, and what it is to learn from the rest."""
    english, code = passages()
    rows = shuffled(english[::2] + code[::2])
    labels = len(english[::2] + code[::2])
    reader = classifier(labels)
    print(f"Training {reader.num_parameters():,} parameters to tell {labels} texts apart …", flush=True)
    trainer(Trainer, reader, arguments(TrainingArguments, steps, learning_rate=2e-3), rows).train()
    model = classifier(2)
    model.base_model.load_state_dict(reader.base_model.state_dict())
    return model, shuffled(equally_many([torch.cat(english[1::2]), torch.cat(code[1::2])]))


class Bar(ProgressCallback):
    """A progress bar of the training alone, without the logs."""

    def on_log(self, *_: Any, **__: Any) -> None: ...

    def on_prediction_step(self, *_: Any, **__: Any) -> None: ...


def arguments(cls: type[TrainingArguments], steps: int, **more: Any) -> Any:
    return cls(
        output_dir=str(Path(tempfile.gettempdir()) / "zo-quickstart"),
        max_steps=steps,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        dataloader_pin_memory=torch.cuda.is_available(),
        **more,
    )


def accuracy(prediction: Any) -> Row:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def trainer(cls: type[Trainer], model: Any, args: TrainingArguments, rows: Rows, held_out: Rows | None = None) -> Any:
    result = cls(model, args, train_dataset=rows, eval_dataset=held_out, compute_metrics=accuracy)
    result.remove_callback(ProgressCallback)
    result.add_callback(Bar)
    return result


# The comparison


def trained(name: str, start: Path, steps: int, seed: int) -> Row:
    """Trains the model stored in ``start``; returns a row of the table."""
    model, rows = torch.load(start, weights_only=False)
    train, held_out = rows[HELD_OUT:], rows[:HELD_OUT]
    if name == "ZOTrainer":
        batches = [{"input_ids": torch.stack([row["input_ids"] for row in train[:128]])}]
        model = activation_adapter(model, batches, task_type="SEQ_CLS")
        trains = trainer(ZOTrainer, model, arguments(ZOTrainingArguments, steps, seed=seed), train, held_out)
    else:
        args = arguments(TrainingArguments, steps, seed=seed, learning_rate=1e-3)
        trains = trainer(Trainer, model, args, train, held_out)
    before = trains.evaluate()
    begin = time.perf_counter()
    with Memory() as memory:
        trains.train()
    seconds = time.perf_counter() - begin
    after = trains.evaluate()
    with Tensors() as tensors:
        trainer(type(trains), trains.model, arguments(type(trains.args), 2, seed=seed), train).train()
    row = {"before": before["eval_accuracy"], "accuracy": after["eval_accuracy"], "loss": after["eval_loss"]}
    return {**row, "seconds": seconds, "tensors": tensors.peak, "data": memory.data, "whole": memory.peak}


class Tensors(TorchDispatchMode):
    """Peak size of the tensors that are made in a ``with`` block, in MiB."""

    def __enter__(self) -> Tensors:
        self.alive: dict[weakref.ref[Any], int] = {}
        self.peak = 0.0
        return super().__enter__()

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = self.storages((args, kwargs))
        result = function(*args, **(kwargs or {}))
        for storage in self.storages(result) - given:
            self.alive[weakref.ref(storage, self.alive.pop)] = storage.nbytes()
        self.peak = max(self.peak, sum(self.alive.values()) / 2**20)
        return result

    @staticmethod
    def storages(values: Any) -> set[Any]:
        return {value.untyped_storage() for value in tree_leaves(values) if isinstance(value, torch.Tensor)}


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


def in_a_process_of_its_own(function: Callable[..., Row], *args: object) -> Row:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="zeroth-order steps, two forwards each")
    parser.add_argument("--pretraining-steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=42, help="of directions and batches")
    args = parser.parse_args()
    start = pretrained(args.pretraining_steps)

    runs = {"ZOTrainer": args.steps, "Trainer": max(args.steps // 5, 1)}
    table = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "start.pt"
        torch.save(start, path)
        for name, steps in runs.items():
            how = "of backpropagation" if name == "Trainer" else "with forward passes only"
            print(f"Documentation or code? {steps} steps {how} …", flush=True)
            table[name] = in_a_process_of_its_own(trained, name, path, steps, args.seed)

    print(f"\nHeld-out accuracy before: {table['Trainer']['before']:.3f}\n")
    print(f"{'':10}{'accuracy':>10}{'loss':>8}{'steps':>7}{'time':>8}{'tensors':>12}{'memory':>10}{'peak':>10}")
    for name, row in table.items():
        numbers = f"{row['accuracy']:>10.3f}{row['loss']:>8.3f}{runs[name]:>7}{row['seconds']:>6.0f} s"
        print(f"{name:10}{numbers}{row['tensors']:>8.1f} MiB{row['data']:>6.0f} MiB{row['whole']:>6.0f} MiB")
    print(ENDING)


ENDING = """
"Tensors" are those that two steps have at the same time, beside model and data. "Memory"
(for data) and "peak" (code and files included) are those of the process, on top of what
evaluating took, which leaves room that training uses again.

Where backpropagation fits, it learns more per second. ZOTrainer is for where it does
not fit: it needs no gradients, no optimizer state and no stored activations.

What to try next:
  zo-estimate NAME-OR-FOLDER                # will your model fit, and how fast will it be?
  python examples/peft_adapters.py          # LoRA and prefixes
  python examples/offload_from_disk.py      # a model that is larger than the memory
  docs/hugging-face.md, docs/using.md       # your own script"""


if __name__ == "__main__":
    main()
