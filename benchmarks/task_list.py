"""The tasks of `tasks.py` and `text_tasks.py` by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from . import tasks, text_tasks
from .tasks import CACHE, Batch, Maker, Task

#: Those whose runs take seconds.
TASKS: dict[str, Callable[[Maker], Task]] = {
    "linear": tasks.linear,
    "mlp": tasks.mlp,
    "cnn": tasks.cnn,
    "vit": tasks.vit,
    "marker": tasks.marker,
    "bert-head": text_tasks.bert_head,
    "bert-head-modules": text_tasks.bert_head_modules,
    "bert-classify": text_tasks.bert_classify,
    "bert-tokens": text_tasks.bert_tokens,
    "bert-embed": text_tasks.bert_embed,
    "bert-swapped": text_tasks.bert_swapped,
    "bert-swapped-lora": text_tasks.bert_lora,
    "lm": text_tasks.lm,
    "lm-lora": text_tasks.lm_lora,
    "llama": text_tasks.llama_code,
    "llama-lora": text_tasks.llama_lora,
    "llama-prefix": text_tasks.llama_prefix,
    "llama-nf4": text_tasks.llama_nf4,
    "t5": text_tasks.t5,
}
#: Those whose runs take minutes, for which one has to ask.
LARGE: dict[str, Callable[[Maker], Task]] = {"bert-large": text_tasks.bert_large}


#: What tasks need besides torch and transformers.
NEEDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("linear", "mlp", "cnn", "vit"), ("sklearn",)),
    **dict.fromkeys(("bert-swapped-lora", "lm-lora", "llama-lora", "llama-prefix"), ("peft",)),
    "llama-nf4": ("bitsandbytes",),
}


def lacking(name: str) -> list[str]:
    """The packages that a task needs and that are not installed."""
    return [package for package in NEEDS.get(name, ()) if find_spec(package) is None]


def make_task(
    name: str, folder: Path = CACHE, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Task:
    """The task of this name; its trained model is read from ``folder``, or written to it.

    Args:
        name: of `TASKS` or `LARGE`.
        folder: for trained models.
        device: of the model and the batches; None takes the CPU.
        dtype: of the model, which was trained in float32, and of numbers in the batches.
    """
    device = device or torch.device("cpu")
    task = {**TASKS, **LARGE}[name](Maker(folder, device))

    def data(step: int) -> Batch:
        return tuple(column.to(device, dtype if column.is_floating_point() else None) for column in task.data(step))

    return replace(task, model=task.model.to(device, dtype), data=data)
