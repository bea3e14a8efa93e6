"""Fine-tune a language model with forward passes only, in under three minutes on two CPU cores.

A small causal language model learns English from Python's own documentation by backpropagation;
then it is fine-tuned on another domain, the source code of the standard library, once with
`ZOTrainer` (no backward pass, memory of inference) and once with `Trainer`.

    python examples/quickstart.py
    python examples/quickstart.py --model facebook/opt-125m --dataset wikitext --dataset-config wikitext-2-raw-v1

With --model and --dataset (network needed), that model is fine-tuned on that data instead.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
import math
import pydoc_data.topics
import sys
import tempfile
import time
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
    """A model that knows documentation, and source code as the domain to adapt to."""
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


def reset_peak() -> int:
    """Forgets the highest memory so far; returns what is used now, in bytes."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak() -> int:
    """The highest memory since `reset_peak`, in bytes."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else status("VmHWM")


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def quiet(trainer: Trainer) -> Trainer:
    """Without the callback that prints every log."""
    trainer.remove_callback(PrinterCallback)
    return trainer


def run(trainer: Trainer, forwards: int) -> list[str]:
    """Trains, and returns a row of the table."""
    measurable = torch.cuda.is_available() or sys.platform == "linux"  # only Linux tells the peak of a part of a run
    before = reset_peak() if measurable else 0
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    extra = f"{(peak() - before) / 2**20:.0f} MB" if measurable else "unknown"
    loss = trainer.evaluate()["eval_loss"]
    return [f"{loss:.3f}", f"{seconds:.0f} s", f"{forwards / seconds:.0f}", extra]


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
    if args.model:
        model, rows = from_hub(args.model, args.dataset, args.dataset_config)
    else:
        model, rows = offline(args.pretraining_steps)
    held_out, train = rows[:64], rows[64:]
    lr = args.lr or (1e-6 if args.model else 3e-4)

    print(
        f"Fine-tuning on the new domain: {args.steps} zeroth-order steps, then {args.steps // 6} of backpropagation …"
    )
    data = {"train_dataset": train, "eval_dataset": held_out}
    zo = quiet(ZOTrainer(copy.deepcopy(model), arguments(ZOTrainingArguments, args.steps, lr), **data))
    before = zo.evaluate()["eval_loss"]
    table = {"ZOTrainer": run(zo, 2 * args.steps)}
    steps = args.steps // 6
    backprop = quiet(Trainer(model, arguments(TrainingArguments, steps, 1e-5 if args.model else 1e-3), **data))
    table["Trainer"] = run(backprop, steps)
    print(f"\nHeld-out loss before: {before:.3f} (perplexity {math.exp(before):.2f})\n")
    print(f"{'':10}{'loss after':>12}{'time':>8}{'forwards/s':>12}{'extra peak':>12}")
    for name, (loss, seconds, rate, extra) in table.items():
        print(f"{name:10}{loss:>12}{seconds:>8}{rate:>12}{extra:>12}")
    print(
        "\n'Extra peak' is memory on top of what was used at the start. Backpropagation learns more per second where\n"
        "it fits; ZOTrainer is for where it does not: it needs no gradients, optimizer state or stored activations."
    )


if __name__ == "__main__":
    main()
