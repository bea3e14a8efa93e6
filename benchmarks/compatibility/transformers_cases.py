"""The trainers of transformers, with common ways of customising them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import BEMACallback

from .hugging_face import Case
from .models import VOCAB, arguments, bert, llama, t5, tokenizer
from .written_out import LR


def texts(count: int = 32, length: int = 8) -> list[dict[str, Any]]:
    """Rows for a language model."""
    draw = torch.Generator().manual_seed(0)
    tokens = [torch.randint(5, VOCAB, (length,), generator=draw) for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in tokens]


def classified() -> list[dict[str, Any]]:
    """Rows for a classifier."""
    return [{"input_ids": row["input_ids"], "labels": index % 3} for index, row in enumerate(texts())]


def translated() -> list[dict[str, Any]]:
    """Rows for an encoder and a decoder."""
    return [{"input_ids": row["input_ids"], "labels": row["input_ids"][:5]} for row in texts()]


def case(
    setting: str,
    cls: type[Any] = Trainer,
    model: Callable[[], Any] = llama,
    data: Callable[[], Any] = texts,
    *,
    remark: str = "",
    config: type[Any] = TrainingArguments,
    own: Callable[[], dict[str, Any]] = dict,
    also: Any = None,
    **settings: Any,
) -> Case:
    def make(wrap: Callable[[type], type], **zo: Any) -> Any:
        return wrap(cls)(model=model(), args=arguments(config, **settings), train_dataset=data(), **own(), **zo)

    name = "Seq2SeqTrainer" if issubclass(cls, Seq2SeqTrainer) else "Trainer"
    return Case(name, setting, make, remark, also)


class ErrorRate(Trainer):
    """An objective without a gradient, as a Python number."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> float:
        scores = model(input_ids=inputs["input_ids"]).logits[:, :-1]
        return float((scores.argmax(-1) != inputs["input_ids"][:, 1:]).float().mean())


class Masked(Trainer):
    """Draws random numbers while it prepares a batch."""

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        other = torch.randint_like(inputs["input_ids"], 5, VOCAB)
        hidden = torch.rand(other.shape) < 0.3
        return {**inputs, "input_ids": torch.where(hidden, other, inputs["input_ids"])}


class Groups(Trainer):
    """Layers with their own learning rates, and a head without one."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        assert isinstance(self.model, nn.Module)
        named = dict(self.model.named_parameters())
        head = [p for name, p in named.items() if "lm_head" in name]
        body = [p for name, p in named.items() if "lm_head" not in name]
        self.optimizer = torch.optim.SGD([{"params": body, "lr": 2 * LR}, {"params": head, "lr": 0.0}], lr=LR)
        return self.optimizer


class Freeze(TrainerCallback):
    """Freezes the first layer after the first step."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.model.layers[0].requires_grad_(False)


class Average(TrainerCallback):
    """A typical average of the weights."""

    def __init__(self) -> None:
        self.mean: dict[str, Tensor] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for name, value in model.named_parameters():
            before = self.mean.get(name, value.detach())
            self.mean[name] = before * 0.5 + value.detach() * 0.5


def average(trainer: Any) -> dict[str, Tensor]:
    return next(each for each in trainer.callback_handler.callbacks if isinstance(each, Average)).mean


def bias_corrected(trainer: Any) -> dict[str, Tensor]:
    callback = next(each for each in trainer.callback_handler.callbacks if isinstance(each, BEMACallback))
    return callback.running_model.state_dict()


def squared(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A user-defined loss function."""
    return outputs.logits.square().mean()


CASES = [
    case("language model"),
    case("classifier", model=bert, data=classified),
    case("gradient_accumulation_steps=2", gradient_accumulation_steps=2),
    case("gradient_accumulation_steps=2, classifier", model=bert, data=classified, gradient_accumulation_steps=2),
    case("label_smoothing_factor=0.1", label_smoothing_factor=0.1),
    case("compute_loss_func", own=lambda: {"compute_loss_func": squared}),
    case("compute_loss returns a Python number", ErrorRate),
    case("_prepare_inputs draws random numbers", Masked),
    case("create_optimizer with groups", Groups),
    case("optimizer_cls_and_kwargs", own=lambda: {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 2 * LR})}),
    case("a callback that freezes layers", own=lambda: {"callbacks": [Freeze()]}),
    case("a callback that averages parameters", own=lambda: {"callbacks": [Average()]}, also=average),
    case("BEMACallback of TRL", own=lambda: {"callbacks": [BEMACallback(update_freq=1)]}, also=bias_corrected),
    case("evaluation in each step", eval_strategy="steps", eval_steps=1, own=lambda: {"eval_dataset": texts(8)}),
    case(
        "encoder and decoder",
        Seq2SeqTrainer,
        t5,
        translated,
        config=Seq2SeqTrainingArguments,
        own=lambda: {"data_collator": DataCollatorForSeq2Seq(tokenizer())},
    ),
    case(
        "predict_with_generate",
        Seq2SeqTrainer,
        t5,
        translated,
        config=Seq2SeqTrainingArguments,
        own=lambda: {"data_collator": DataCollatorForSeq2Seq(tokenizer()), "eval_dataset": translated()[:4]},
        predict_with_generate=True,
        eval_strategy="steps",
        eval_steps=1,
    ),
]
