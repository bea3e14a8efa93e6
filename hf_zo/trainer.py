"""`ZOTrainer`: the Hugging Face `Trainer` with only forward passes."""

from __future__ import annotations

from transformers import Trainer

from .mixin import ZOTrainerMixin


class ZOTrainer(ZOTrainerMixin, Trainer):
    """Drop-in replacement for `transformers.Trainer`: it has the same arguments, and ``zo_config``.

        ZOTrainer(model=model, args=args, train_dataset=train, processing_class=tokenizer).train()

    See `ZOTrainerMixin` for the differences.
    """
