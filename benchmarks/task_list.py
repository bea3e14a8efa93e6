"""The tasks of `tasks.py` and `text_tasks.py` by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from . import tasks, text_tasks
from .tasks import CACHE, Maker, Task

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


def make_task(name: str, folder: Path = CACHE) -> Task:
    """The task of this name; its trained model is read from ``folder``, or written to it."""
    return {**TASKS, **LARGE}[name](Maker(folder))
