"""Scores in place of the loss in `ZOTrainer`: functions of a model's outputs, and what ``compute_metrics`` returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer
from transformers.trainer_pt_utils import nested_numpify

from zo_core import ConfigError, LossError

PREFIX = "compute_metrics:"
EVAL = "eval_"


class Objective(Protocol):
    """A score of a model on a batch, larger is better."""

    def __call__(self, trainer: Trainer, model: nn.Module, inputs: Any) -> Tensor:
        """Returns the score, of shape ``[]``."""
        ...


def objective_of(given: str | Callable[[Any, Any], Any], trainer: Trainer) -> Objective:
    """Returns the objective that the argument ``objective`` of a trainer stands for.

    Raises:
        ConfigError: it stands for none.
    """
    if callable(given):
        return OfOutputs(given)
    if not isinstance(given, str) or not given.startswith(PREFIX) or given == PREFIX:
        raise ConfigError(
            [
                f"objective={given!r} must be a function of the model's outputs and the batch that returns a number, "
                f"or {PREFIX + 'NAME'!r} for a number that compute_metrics returns"
            ]
        )
    problems = []
    if trainer.compute_metrics is None:
        problems.append(f"objective={given!r} needs compute_metrics; pass the function that returns that number")
    if trainer.args.batch_eval_metrics:
        problems.append(
            f"objective={given!r} calls compute_metrics with one batch at a time; leave out batch_eval_metrics"
        )
    if problems:
        raise ConfigError(problems)
    return OfMetrics(given.removeprefix(PREFIX))


class OfOutputs:
    """A function of ``(outputs, inputs)``.

    Args:
        function: called with what the model returns and with the batch that it got.
    """

    def __init__(self, function: Callable[[Any, Any], Any]):
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)

    def __call__(self, trainer: Trainer, model: nn.Module, inputs: Any) -> Tensor:
        return _number(self.function(model(**inputs), inputs), f"objective={self.name}", trainer.args.device)


class OfMetrics:
    """A number that ``compute_metrics`` returns, computed on the predictions for one micro-batch.

    Args:
        name: its key, with or without the prefix ``eval_``.
    """

    def __init__(self, name: str):
        self.name = name

    def __call__(self, trainer: Trainer, model: nn.Module, inputs: Any) -> Tensor:
        assert trainer.compute_metrics is not None
        _, logits, labels = Trainer.prediction_step(trainer, model, inputs, prediction_loss_only=False)
        if trainer.preprocess_logits_for_metrics is not None and logits is not None and labels is not None:
            logits = trainer.preprocess_logits_for_metrics(logits, labels)
        own = {"inputs": nested_numpify(inputs)} if "inputs" in trainer.args.include_for_metrics else {}
        found = trainer.compute_metrics(
            EvalPrediction(predictions=nested_numpify(logits), label_ids=nested_numpify(labels), **own)
        )
        for name in (self.name, EVAL + self.name, self.name.removeprefix(EVAL)):
            if name in found:
                return _number(found[name], f"objective={PREFIX + self.name!r}", trainer.args.device)
        raise LossError(
            f"objective={PREFIX + self.name!r}: compute_metrics returned {', '.join(map(repr, found)) or 'nothing'}; "
            "write one of these names"
        )


def _number(value: Any, said: str, device: torch.device) -> Tensor:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return value.detach().double().reshape(())
    try:
        return torch.tensor(float(value), dtype=torch.float64, device=device)
    except (TypeError, ValueError, RuntimeError):
        what = f"tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise LossError(f"{said} returned a {what}; return one number, for example an accuracy") from None
