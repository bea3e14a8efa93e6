"""`ZOTrainer`: the Hugging Face `Trainer` with only forward passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments

from zo_core import ZOConfig

from .arguments import ZOTrainingArguments
from .mixin import ZOTrainerMixin
from .objectives import Objective, objective_of


class ZOTrainer(ZOTrainerMixin, Trainer):
    """Drop-in replacement for `transformers.Trainer`: it has the same arguments, ``zo_config`` and ``objective``.

        ZOTrainer(model=model, args=args, train_dataset=train, processing_class=tokenizer).train()

    See `ZOTrainerMixin` for the differences. Without arguments it makes `ZOTrainingArguments`.

    Args:
        objective: a score to maximise in place of the loss: a function of the model's outputs and the batch that
            returns a number (an accuracy, an F1, any measure without a gradient), or ``"compute_metrics:NAME"`` for
            the number of that name that ``compute_metrics`` returns for the batch. It is computed on each
            micro-batch, and a step maximises the mean. The logged ``loss`` is then minus the score, and ``eval_loss``
            is still the model's own loss. None trains on the loss.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *others: Any,
        objective: str | Callable[[Any, Any], Any] | None = None,
        **kwargs: Any,
    ):
        self._zo_scored = objective is not None
        self._zo_objective: Objective | None = None
        super().__init__(model, ZOTrainingArguments() if args is None else args, *others, **kwargs)
        if objective is not None:
            self._zo_objective = objective_of(objective, self)
            self.model_accepts_loss_kwargs = False  # the score of a step is the mean over its micro-batches

    def _resolve_config(self, config: ZOConfig | None) -> ZOConfig:
        resolved = super()._resolve_config(config)
        return resolved.replace(maximize=True) if self._zo_scored else resolved

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Returns the objective in training, if there is one, and else the loss."""
        if self._zo_objective is None or return_outputs:  # evaluations ask for the outputs, training steps do not
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        score = self._zo_objective(self, model, inputs)
        scaled = getattr(self, "loss_is_scaled_for_ga", None)  # older versions of Trainer do not have it
        if scaled or (scaled is None and self.compute_loss_func is not None):
            score = score / self.current_gradient_accumulation_steps  # Trainer does not divide then
        return score
