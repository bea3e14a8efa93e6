"""Does `suggest_lr` find the rate that a search would find? Six tasks, full and LoRA, three methods.

Each model is first trained by backpropagation on one task, then fine-tuned on a shifted one with a
fixed number of forwards at every rate of a grid (factor 2). The suggestion comes from a range test
before the first step. It is good if it is within a factor of 3 of the best rate of the grid, and
the run at the suggested rate must learn.

    python -m benchmarks.suggest_lr                  # a table
    python -m benchmarks.suggest_lr --tasks mlp cnn --methods spsa
"""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
import math
import pydoc_data.topics
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zo_core import LrSuggestion, ZeroOrder, ZOConfig, suggest_lr

from .learning import TinyTransformer, batch
from .report import save

Batch = tuple[Tensor, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]

FORWARDS = 1000
LENGTH = 32
SOURCES = "argparse ast dataclasses difflib functools heapq logging pathlib pickle random statistics tarfile typing"


@dataclass(frozen=True)
class Task:
    """A model trained on one task, and batches of a shifted task.

    Attributes:
        model: copied for every run.
        data: the batch of a step; negative numbers are held out.
        loss: the loss of a model on a batch.
        eps: distance of the probes for spsa; fzoo uses a tenth.
    """

    model: nn.Module
    data: Callable[[int], Batch]
    loss: Loss
    eps: float = 1e-3


def cross_entropy(model: nn.Module, pair: Batch) -> Tensor:
    """Cross-entropy of a model that returns logits, or of a Hugging Face model that returns an output."""
    output = model(pair[0])
    logits = getattr(output, "logits", output)
    return F.cross_entropy(logits.flatten(0, -2), pair[1].flatten())


def backprop(model: nn.Module, steps: int, data: Callable[[int], Batch], lr: float) -> None:
    """AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model.train()
    for step in range(steps):
        loss = cross_entropy(model, data(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def sampler(inputs: Tensor, labels: Tensor, size: int) -> Callable[[int], Batch]:
    """Random rows, the same for the same step; a fifth of them is held out for negative steps."""
    held = len(inputs) // 5

    def data(step: int) -> Batch:
        generator = torch.Generator().manual_seed(1_000_003 + step)
        rows = torch.randint(0, held, (4 * size,), generator=generator)
        if step >= 0:
            rows = held + torch.randint(0, len(inputs) - held, (size,), generator=generator)
        return inputs[rows], labels[rows]

    return data


@lru_cache
def digits() -> Batch:
    """1,797 handwritten digits, in a fixed random order: ``[1797, 1, 8, 8]``."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 16.0, torch.tensor(labels)[order]


def shifted_digits() -> Batch:
    """The digits at half the contrast and with noise, moved by one pixel."""
    images, labels = digits()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return images.roll(1, -1) * 0.5 + 0.1 * noise, labels


def digits_task(model: nn.Module) -> Task:
    backprop(model, 400, sampler(*digits(), 64), 3e-3)
    return Task(model, sampler(*shifted_digits(), 64), cross_entropy)


def mlp() -> Task:
    """9,610 parameters."""
    return digits_task(nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)))


def cnn() -> Task:
    """With max-pooling and BatchNorm."""
    return digits_task(
        nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 10),
        )
    )


def marker() -> Task:
    """The small transformer and the task of `benchmarks.learning`."""
    model = TinyTransformer()
    backprop(model, 600, lambda step: batch(128, 10_000 + step, shifted=False), 3e-3)
    return Task(model, lambda step: batch(64, 1_000_000 + step, shifted=True), cross_entropy)


def text(code: bool) -> Tensor:
    """Bytes of Python's documentation or of its source code, in rows of `LENGTH`."""
    if code:
        joined = "\n".join(inspect.getsource(importlib.import_module(name)) for name in SOURCES.split())
    else:
        joined = "\n".join(pydoc_data.topics.topics.values())
    tokens = torch.tensor(list(joined.encode()))
    rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def language_model() -> nn.Module:
    """A Llama on bytes, 76,000 parameters, that has read the documentation."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=1,
            num_attention_heads=4,
            vocab_size=256,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
        )
    )
    rows = text(code=False)
    backprop(model, 500, sampler(rows[:, :-1], rows[:, 1:], 32), 3e-3)
    return model


def lm() -> Task:
    """English, then source code."""
    rows = text(code=True)
    return Task(language_model(), sampler(rows[:, :-1], rows[:, 1:], 16), cross_entropy)


def lm_lora() -> Task:
    """As `lm`, with LoRA of rank 4."""
    from peft import LoraConfig, get_peft_model

    task = lm()
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"])
    return Task(get_peft_model(task.model, lora).eval(), task.data, task.loss, eps=1e-2)


def bert_model() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=1,
            num_attention_heads=4,
            vocab_size=256,
            max_position_embeddings=LENGTH,
            num_labels=2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def bert_task() -> Task:
    """Which of two texts a piece is from; first in lower case, then with upper and lower case swapped."""
    english, code = text(code=False), text(code=True)
    count = min(len(english), len(code))
    rows = torch.cat([english[:count], code[:count]])
    labels = torch.arange(2).repeat_interleave(count)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(2))
    rows, labels = rows[order], labels[order]
    small = (rows >= 97) & (rows <= 122)
    large = (rows >= 65) & (rows <= 90)
    swapped = torch.where(small, rows - 32, torch.where(large, rows + 32, rows))
    model = bert_model()
    backprop(model, 300, sampler(rows, labels, 32), 1e-3)
    return Task(model, sampler(swapped, labels, 32), cross_entropy)


def bert_lora() -> Task:
    """The classifier with LoRA and a trained head."""
    from peft import LoraConfig, get_peft_model

    task = bert_task()
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], task_type="SEQ_CLS")
    return Task(get_peft_model(task.model, lora).eval(), task.data, task.loss, eps=1e-2)


TASKS: dict[str, Callable[[], Task]] = {
    "mlp": mlp,
    "cnn": cnn,
    "marker": marker,
    "bert": bert_task,
    "bert-lora": bert_lora,
    "lm": lm,
    "lm-lora": lm_lora,
}
METHODS: dict[str, dict[str, Any]] = {
    "spsa": {},
    "spsa momentum": {"rule": "momentum"},
    "fzoo": {"estimator": "fzoo"},
}


def config(task: Task, method: str) -> ZOConfig:
    return ZOConfig(eps=task.eps, **METHODS[method])


def held_out(task: Task, model: nn.Module) -> float:
    """The mean loss on four large held-out batches."""
    with torch.no_grad():
        return sum(float(task.loss(model, task.data(-index))) for index in range(1, 5)) / 4


def train(task: Task, settings: ZOConfig, lr: float, forwards: int, seed: int = 1) -> float:
    """The held-out loss after a run; infinite if it diverged."""
    model = copy.deepcopy(task.model)
    zo = ZeroOrder(model, settings, lr=lr, seed=seed)
    bound = 4.0 * held_out(task, model) + 2.0
    for step in range(forwards // len(zo.estimator.points(tuple(range(zo.num_probes)), zo.eps))):
        pair = task.data(step)
        loss = zo.step(lambda: task.loss(model, pair))  # noqa: B023
        if not loss < bound:
            return math.inf
    return held_out(task, model)


def suggested(task: Task, settings: ZOConfig) -> LrSuggestion:
    """The suggestion from eight batches that no run uses."""
    pairs = [task.data(10_000_000 + index) for index in range(8)]
    return suggest_lr(task.model, [lambda pair=pair: task.loss(task.model, pair) for pair in pairs], settings)


def search(run: Callable[[float], float], near: float) -> dict[float, float]:
    """Runs at powers of 2, outwards from one of them until two on either side are worse than the best."""
    results: dict[float, float] = {}
    start = low = high = round(math.log2(near))
    results[2.0**start] = run(2.0**start)
    while True:
        best = round(math.log2(min(results, key=results.__getitem__)))
        if best - low < 2:
            low -= 1
            results[2.0**low] = run(2.0**low)
        elif high - best < 2:
            high += 1
            results[2.0**high] = run(2.0**high)
        else:
            return dict(sorted(results.items()))


def compare(name: str, method: str, task: Task, forwards: int) -> list[str]:
    """One row: the suggestion compared with the grid."""
    settings = config(task, method)
    found = suggested(task, settings)
    grid = search(lambda lr: train(task, settings, lr, forwards), found.lr)
    best = min(grid, key=grid.__getitem__)
    reached = train(task, settings, found.lr, forwards)
    runs = " ".join(f"{lr:.1e}:{loss:.3f}" for lr, loss in grid.items())
    numbers = [f"{found.lr:.1e}", f"{best:.1e}", f"{found.lr / best:.2f}", f"{held_out(task, task.model):.3f}"]
    return [name, method, *numbers, f"{reached:.3f}", f"{grid[best]:.3f}", str(found.forwards), runs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--forwards", type=int, default=FORWARDS)
    parser.add_argument("--save", metavar="NAME", help="write to benchmarks/results under this name")
    args = parser.parse_args()
    columns = ["task", "method", "suggested", "best of grid", "ratio", "loss before", "at suggested", "at best"]
    columns += ["forwards of the test", "grid (rate:loss)"]
    title = f"Suggested learning rates beside a grid; held-out loss after {args.forwards} forwards"
    rows: list[list[str]] = []
    for name in args.tasks:
        torch.manual_seed(0)
        task = TASKS[name]()
        for method in args.methods:
            rows.append(compare(name, method, task, args.forwards))
            save(args.save or "suggest-lr", title, columns, rows, torch.device("cpu"), write=args.save is not None)


if __name__ == "__main__":
    main()
