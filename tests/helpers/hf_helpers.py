"""Shared by the tests of `hf_zo`: quiet arguments, a little data, and the bare loop that a trainer must equal."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from models import VOCAB, tiny
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, get_scheduler

from hf_zo import ZOTrainer, ZOTrainingArguments
from zo_core import StepRecord, ZeroOrder, ZOOptimizer

Weights = dict[str, Tensor]
Batch = dict[str, Any]
Loss = Callable[[nn.Module, Batch], Tensor]

#: What this release of transformers calls the setting; newer ones take the first name as a deprecated alias.
CHECKPOINTING = "gradient_checkpointing"
if hasattr(TrainingArguments, "activation_checkpointing"):
    CHECKPOINTING = "activation_checkpointing"


def arguments(path: Path, cls: type[TrainingArguments] = TrainingArguments, **changes: Any) -> Any:
    """Arguments for a short, silent run on the CPU: four steps of four rows make an epoch of `texts`."""
    settings: dict[str, Any] = {
        "output_dir": str(path / "out"),
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
    }
    return cls(**{**settings, **changes})


def texts(count: int = 16, length: int = 8, seed: int = 0) -> list[Batch]:
    """Rows for a language model; the labels of one to four positions are masked."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        tokens = torch.randint(3, VOCAB, (length,), generator=generator)
        labels = tokens.clone()
        labels[: 1 + index % 4] = -100
        rows.append({"input_ids": tokens, "labels": labels})
    return rows


def saved_llama(folder: Path) -> Path:
    """A float model on disk, as a user has one, wide enough to be quantised in blocks."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def adapted(model: nn.Module, config: PeftConfig) -> PeftModel:
    """The model with adapters."""
    torch.manual_seed(0)
    return get_peft_model(model, config)


def weights(model: nn.Module) -> Weights:
    """A copy of all parameters and buffers."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def differing(a: Weights, b: Weights) -> list[str]:
    """Names of the tensors that are not equal to the last bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def logged(trainer: Trainer, key: str) -> list[Any]:
    """All logged values of one key, in order."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def zo_trainer(path: Path, model: str = "llama", cls: type[Any] = ZOTrainer, **settings: Any) -> Any:
    """A trainer on `texts`; keywords that are not arguments of the trainer are training arguments."""
    names = ("zo_config", "callbacks", "compute_loss_func", "compute_metrics", "eval_dataset", "optimizers")
    own = {name: settings.pop(name) for name in names if name in settings}
    own = {"model": tiny(model), "train_dataset": texts(), **own}
    if "optimizers" in own:
        own["optimizers"] = own["optimizers"](own["model"])
    return cls(args=arguments(path, **settings), **own)


class Watched(Trainer):
    """The plain `Trainer`, but it trains nothing: it keeps the batches of each step."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.steps: dict[int, list[Batch]] = {}
        return super().train(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        batch = {**inputs, "num_items_in_batch": num_items_in_batch}
        self.steps.setdefault(self.state.global_step, []).append(batch)
        return torch.zeros(())


def models_own(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch).loss


def batches(model: nn.Module, args: TrainingArguments, dataset: Any) -> list[list[Batch]]:
    """The micro-batches of each step, as the plain `Trainer` gets them."""
    plain = Watched(model=copy.deepcopy(model), args=copy.copy(args), train_dataset=dataset)
    plain.train()
    return list(plain.steps.values())


def bare_loop(
    model: nn.Module, args: TrainingArguments, dataset: Any, loss: Loss = models_own, **settings: Any
) -> list[StepRecord]:
    """Trains ``model`` with `ZeroOrder` alone, on the batches, groups and schedule of the plain `Trainer`."""
    optimizer = ZOOptimizer(groups(model, args), lr=args.learning_rate, eps=settings.pop("eps", 1e-3))
    zo = ZeroOrder(model, optimizer=optimizer, **{"seed": args.seed, **settings})
    steps = batches(model, args, dataset)
    warmup = args.get_warmup_steps(len(steps))
    return run(zo, steps, get_scheduler(args.lr_scheduler_type, zo.optimizer, warmup, len(steps)), loss)


def groups(model: nn.Module, args: TrainingArguments) -> list[dict[str, Any]]:
    """The parameters as the plain `Trainer` groups them for its own optimizer."""
    plain = Trainer(model=model, args=copy.copy(args)).create_optimizer()
    return [{k: g[k] for k in ("params", "weight_decay")} for g in plain.param_groups if g["params"]]


def run(zo: ZeroOrder, steps: list[list[Batch]], scheduler: Any, loss: Loss = models_own) -> list[StepRecord]:
    """One optimizer step for each list of micro-batches."""
    records = []
    for micro_batches in steps:
        for batch in micro_batches:
            zo.measure(lambda batch=batch: loss(zo.model, dict(batch)))
        records.append(zo.optimizer.step())
        scheduler.step()
    return records


def seedlog_trainer(path: Path, **changes: Any) -> Any:
    """Eight steps in two epochs, with everything that must advance: schedule, shuffling, accumulation.

    ``changes`` are arguments of the trainer, of its arguments, or ``cls``.
    """
    given = {
        "cls": ZOTrainer, "num_train_epochs": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3, "lr_scheduler_type": "cosine", "weight_decay": 0.1, **changes,
    }  # fmt: skip
    own = {name: given.pop(name) for name in ("model", "callbacks", "eval_dataset", "zo_config") if name in given}
    cls = given.pop("cls")
    torch.manual_seed(0)
    args = arguments(path, ZOTrainingArguments, **given)
    return cls(**{"model": tiny("llama"), "args": args, "train_dataset": texts(), **own})


#: Where and along what `ZOTrainer` measures: resident, streamed, without copies.
PLACES: list[dict[str, Any]] = [{}, {"offload": "cpu"}, {"noise": "low_rank"}]
