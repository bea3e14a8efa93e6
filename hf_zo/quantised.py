"""Quantised models: transformers refuses to train some of them, because backpropagation cannot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from zo_core import TARGETS, ZOConfig
from zo_core.targets import has_adapters

FLAG = "_hf_peft_config_loaded"


@contextmanager
def quantised_training(args: tuple[Any, ...], kwargs: dict[str, Any], config: object) -> Iterator[None]:
    """A context for constructing a trainer: allows a model whose quantisation scales or adapters are trained.

    Scales are prepared immediately, because a checkpoint may be loaded before the first step. With adapters,
    transformers only refuses quantisation methods without backpropagation.

    Args:
        args, kwargs: arguments of the trainer's constructor.
        config: its ``zo_config``.
    """
    model = kwargs.get("model", args[0] if args else None)
    settings = kwargs.get("args", args[1] if len(args) > 1 else None)
    name = config.target if isinstance(config, ZOConfig) else getattr(settings, "zo_target", "auto")
    try:
        target = TARGETS.resolve(name)
    except ValueError:  # reported with all other settings
        yield
        return
    of_quantised = isinstance(model, nn.Module) and target.chosen(model).of_quantised
    if not isinstance(model, nn.Module) or not (of_quantised or has_adapters(model)):
        yield
        return
    if of_quantised:
        target.slots(model)
    own = vars(model).get(FLAG)
    setattr(model, FLAG, True)
    try:
        yield
    finally:
        if own is None:
            delattr(model, FLAG)
        else:
            setattr(model, FLAG, own)
