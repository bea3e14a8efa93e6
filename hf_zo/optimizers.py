"""Finds which weights a trainer trains, in which groups, and whether its user has chosen an optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from zo_core import ConfigError, Slot, ZeroOrder, ZOConfig, ZOOptimizer
from zo_core.config import AUTO
from zo_core.optimizer import param_groups

from .checks import default


def chosen_by_user(trainer: Trainer, built: torch.optim.Optimizer) -> str | None:
    """Returns the setting by which the user chose an optimizer; None if the trainer built its default one.

    Args:
        trainer: the trainer.
        built: the optimizer from its ``create_optimizer``.
    """
    if trainer.optimizer_cls_and_kwargs is not None:
        return "optimizer_cls_and_kwargs"
    owners = [cls for cls in type(trainer).__mro__ if "create_optimizer" in vars(cls)]
    if any(cls is not Trainer and not cls.__module__.startswith("hf_zo.") for cls in owners):
        return "create_optimizer"
    for name in ("optim", "optim_args", "optim_target_modules"):
        value = getattr(trainer.args, name, None)
        usual = default(trainer.args, name)
        if value != (OptimizerNames(usual) if name == "optim" else usual):
            return f"{name}={str(getattr(value, 'value', value))!r}"
    usual_class = Trainer.get_optimizer_cls_and_kwargs(trainer.args)[0]
    return None if type(built) is usual_class else "get_optimizer_cls_and_kwargs"


@contextmanager
def numbers_of(args: TrainingArguments, config: ZOConfig) -> Iterator[None]:
    """A context in which the arguments have the learning rate and the weight decay of ``config``, if it sets them.

    A rate that nobody has set is 1 until the engine replaces it, so that groups keep their proportions.
    """
    before = args.learning_rate, args.weight_decay
    if config.lr not in (None, AUTO):
        args.learning_rate = float(config.lr)
    elif args.learning_rate is None:
        args.learning_rate = 1.0
    args.weight_decay = config.weight_decay or args.weight_decay
    try:
        yield
    finally:
        args.learning_rate, args.weight_decay = before


def grouped(slots: list[Slot], like: torch.optim.Optimizer, lr: float, eps: float) -> ZOOptimizer:
    """Makes an optimizer over the slots that ``like`` holds, with the same groups.

    Args:
        slots: slots of the model. Quantisation scales, which no other optimizer holds, get a group without decay.
        like: an optimizer with the learning rate and the weight decay of each parameter.
        lr: learning rate of parameters that ``like`` does not hold.
        eps: distance of the probes from the weights.
    """
    # Groups with equal settings stay separate: checkpoints and logs count them.
    held = {id(tensor): index for index, group in enumerate(like.param_groups) for tensor in group["params"]}
    theirs: list[dict[str, Any]] = [*like.param_groups, {}]
    members: list[list[Slot]] = [[] for _ in theirs]
    for slot in slots:
        index = next((held[id(tensor)] for tensor in slot.tensors if id(tensor) in held), None)
        if index is not None or slot.scaling is not None:
            members[-1 if index is None else index].append(slot)
    groups = [
        {
            "lr": float(lr if each.get("lr") is None else each["lr"]),
            **group,
            "weight_decay": float(each.get("weight_decay") or 0.0),
        }
        for each, own in zip(theirs, members, strict=True)
        for group in param_groups(own)
    ]
    if slots[0].scaling is not None:
        # The first group's eps is the unit of the projected gradient, and this should be the eps of the scales.
        groups.sort(key=lambda group: group["params"][0] is not slots[0].tensor)
    return ZOOptimizer(groups, lr=lr, eps=eps)


def as_in_trainer(engine: ZeroOrder, args: TrainingArguments) -> None:
    """Gives the AdamW of ``backprop``, if there is one, the moments of a trainer's own, and its bound."""
    backprop = engine.backprop
    if backprop is None or backprop.optimizer is None:
        return
    own = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    for group in (backprop.optimizer.defaults, *backprop.optimizer.param_groups):
        group.update(own)
    backprop.bound(args.max_grad_norm)


def whole(trainer: Trainer, model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
    """Returns a module with all trained weights: the model, or the model together with other modules of the trainer.

    A loss may have its own weights, like the classifier in a loss of sentence-transformers.

    Raises:
        ConfigError: the optimizer holds a weight that is not in any module of the trainer.
    """
    known = {id(parameter) for parameter in model.parameters()}
    others = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in known and p.requires_grad]
    if not others or isinstance(optimizer, ZOOptimizer):
        return model
    parts: dict[str, nn.Module] = {"model": model}
    for name, value in vars(trainer).items():
        for key, module in _modules(name, value):
            if any(parameter is other for parameter in module.parameters() for other in others):
                parts[key] = module
    found = {id(parameter) for module in parts.values() for parameter in module.parameters()}
    missing = [list(other.shape) for other in others if id(other) not in found]
    if missing:
        raise ConfigError(
            [
                f"the optimizer of {type(trainer).__name__} holds {len(missing)} tensors (the first of shape "
                f"{missing[0]}) that are neither in its model nor in another module that is an attribute of the "
                "trainer, so no probe could reach them; make them part of the model"
            ]
        )
    return nn.ModuleDict(parts)


def _modules(name: str, value: Any) -> Iterable[tuple[str, nn.Module]]:
    if isinstance(value, nn.Module):
        yield name, value
    elif isinstance(value, dict):
        yield from (
            (f"{name}_{key}".replace(".", "_"), part) for key, part in value.items() if isinstance(part, nn.Module)
        )


def by_decay(trainer: Trainer, model: nn.Module, slot: Slot, group: dict[str, Any]) -> bool:
    """Whether a slot that has become trainable belongs in a group with this weight decay."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return bool(group["weight_decay"]) == (names.get(id(slot.tensor)) in trainer.get_decay_parameter_names(model))
