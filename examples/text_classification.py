"""Fine-tunes an encoder on a text classification task with forward passes only.

    python examples/text_classification.py                                   # offline
    python examples/text_classification.py --model roberta-base --dataset sst2 --text sentence

Offline, a small BERT over bytes first learns by backpropagation to distinguish English from Python source code, on one
half of the topics and modules, and is then fine-tuned on the others: adapters along the
activations move, and no learning rate is given. Prints the accuracy on held-out pieces before and after.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import pydoc_data.topics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification, PrinterCallback, Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that a clone works before it is installed

from hf_zo import ZOTrainer, ZOTrainingArguments, activation_adapter

MODULES = [
    "argparse",
    "ast",
    "dataclasses",
    "difflib",
    "functools",
    "heapq",
    "logging",
    "pathlib",
    "pickle",
    "random",
    "statistics",
    "tarfile",
]


def pieces(text: str, label: int, length: int, width: int = 64) -> list[dict[str, Any]]:
    """Rows of ``length`` bytes, padded to ``width``."""
    data = text.encode()
    rows = []
    for start in range(0, len(data) - length, length):
        ids = [byte % 255 + 1 for byte in data[start : start + length]] + [0] * (width - length)
        rows.append({"input_ids": ids, "attention_mask": [1] * length + [0] * (width - length), "labels": label})
    return rows


def rows(half: int, length: int, count: int) -> list[dict[str, Any]]:
    """English and code in equal parts, from one half of the sources."""
    topics = list(pydoc_data.topics.topics.values())[half::2]
    english = pieces("\n".join(topics), 0, length)
    code = pieces("\n".join(inspect.getsource(importlib.import_module(name)) for name in MODULES[half::2]), 1, length)
    generator = np.random.default_rng(half)
    chosen = [part[index] for part in (english, code) for index in generator.permutation(len(part))[: count // 2]]
    return [chosen[index] for index in generator.permutation(len(chosen))]


def small_encoder() -> BertForSequenceClassification:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(vocab_size=256, max_position_embeddings=64, **shape))


def from_hub(name: str, dataset: str, text: str) -> tuple[Any, Any, Any]:
    """A pretrained encoder, and a data set with the columns ``text`` and ``label``."""
    from datasets import load_dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    data = load_dataset(dataset)
    data = data.map(
        lambda row: tokenizer(row[text], truncation=True, padding="max_length", max_length=128), batched=True
    )
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(set(data["train"]["label"])))
    return model, data["train"].select(range(1000)), data["validation"]


def settings(folder: str, cls: type[TrainingArguments], **more: Any) -> Any:
    quiet = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "logging_strategy": "no"}
    return cls(
        output_dir=folder, per_device_train_batch_size=32, per_device_eval_batch_size=64,
        dataloader_pin_memory=torch.cuda.is_available(), **quiet, **more,
    )  # fmt: skip


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500, help="zeroth-order steps, two forwards each")
    parser.add_argument("--pretraining-steps", type=int, default=60)
    parser.add_argument("--all-weights", action="store_true", help="train all weights instead of adapters")
    parser.add_argument("--learning-rate", type=float, help="by default, steps are normalised by the curvature")
    parser.add_argument("--model", help="an encoder on the Hub")
    parser.add_argument("--dataset", help="a data set on the Hub")
    parser.add_argument("--text", default="text", help="its column with the text")
    args = parser.parse_args()
    if bool(args.model) != bool(args.dataset):
        parser.error("--model and --dataset go together")
    with tempfile.TemporaryDirectory() as folder:
        if args.model:
            model, train, held_out = from_hub(args.model, args.dataset, args.text)
        else:
            model = small_encoder()
            first = settings(folder, TrainingArguments, max_steps=args.pretraining_steps, learning_rate=1e-3)
            first_trainer = Trainer(model, first, train_dataset=rows(0, 48, 4000))
            first_trainer.remove_callback(PrinterCallback)
            first_trainer.train()
            others = rows(1, 48, 4000)
            train = others[:-800]
            seen = {tuple(row["input_ids"]) for row in train}  # lines of dashes come more than once
            held_out = [row for row in others[-800:] if tuple(row["input_ids"]) not in seen]
        if not args.all_weights:
            columns = ("input_ids", "attention_mask")
            rows_of = [train[index] for index in range(128)]
            batch = {name: torch.tensor([row[name] for row in rows_of]) for name in columns}
            model = activation_adapter(model, [batch], task_type="SEQ_CLS")
        rate = {} if args.learning_rate is None else {"learning_rate": args.learning_rate}
        trainer = ZOTrainer(
            model=model,
            args=settings(folder, ZOTrainingArguments, max_steps=args.steps, **rate),
            train_dataset=train,
            eval_dataset=held_out,
            compute_metrics=accuracy,
        )
        trainer.remove_callback(PrinterCallback)
        before = trainer.evaluate()
        trainer.train()
        after = trainer.evaluate()
    for name, result in (("before", before), (f"after {args.steps} steps", after)):
        print(f"{name:20} accuracy {result['eval_accuracy']:.3f}, loss {result['eval_loss']:.3f}")


if __name__ == "__main__":
    main()
