"""`ZOTrainer`: the Hugging Face `Trainer` with only forward passes."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments

from .arguments import ZOTrainingArguments
from .mixin import ZOTrainerMixin


class ZOTrainer(ZOTrainerMixin, Trainer):
    """Drop-in replacement for `transformers.Trainer`: it has the same arguments, and ``zo_config``.

        ZOTrainer(model=model, args=args, train_dataset=train, processing_class=tokenizer).train()

    See `ZOTrainerMixin` for the differences. Without arguments it makes `ZOTrainingArguments`.
    """

    def __init__(
        self, model: nn.Module | None = None, args: TrainingArguments | None = None, *others: Any, **kwargs: Any
    ):
        super().__init__(model, ZOTrainingArguments() if args is None else args, *others, **kwargs)
