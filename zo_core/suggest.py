"""Finds a learning rate by trial runs that are undone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from .config import ZOConfig
from .engine import ZeroOrder
from .lr_range import LrSuggestion
from .offload import Streaming
from .optimizer import ZOOptimizer
from .placement import resolve, slots_of
from .snapshot import check_resident
from .targets import Slot
from .updates import Windows


def suggest_lr(
    model: nn.Module,
    closure: Callable[[], Any] | Sequence[Callable[[], Any]],
    config: ZOConfig | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    forwards: int | None = None,
    steps: int | None = None,
    **overrides: Any,
) -> LrSuggestion:
    """A safe and useful learning rate for this model, loss and method, from forward passes only.

        batches = [next(iterator) for _ in range(8)]
        lr = suggest_lr(model, [lambda batch=batch: model(**batch).loss for batch in batches], eps=1e-3).lr

    Short trial runs start from the same weights, with the same directions and batches, at rates a
    factor of 2 apart; each is judged by the loss on all batches. A first scan at increasing rates, starting
    from harmless ones, finds where the loss blows up. The suggestion is half of the median of the rates
    that achieve 90% of the largest decrease, and at most a quarter of the smallest harmful rate.

    Theory gives the rate only for a single quadratic: with one direction z per step, the expected
    change of the loss is ``-lr ||grad||^2 + lr^2 / 2 E[g^2 z'Hz]``, smallest at about ``1 / tr(H)``, and
    three losses along a z measure ``z'Hz``. One step is not enough, however, because its best rate
    accounts neither for the noise of the batches nor for how the curvature changes. Trials of many steps
    show both. They are short compared with a training run, which leaves less noise at the end; hence the margins.

    Weights, rule state, random generators and modes are restored bit for bit, also after an exception.
    The test needs memory for a copy of the weights that move.

    Args:
        model: as for `ZeroOrder`.
        closure: returns the loss of one batch; better a list of them, one for each of about 8 batches,
            since one batch does not show the noise between batches.
        config: the settings for training; estimator, eps, rule and target matter.
        optimizer: the optimizer for training, if any; the rates of its groups keep their proportions.
        steps: length of a trial run; None takes 128 forwards, and at least 16 steps.
        **overrides: fields of `ZOConfig`, taking precedence over ``config``.

    Returns:
        The rate, and the curve that it comes from; it prints as a table.

    Raises:
        ConfigError: settings are not valid, trained weights are streamed, or no rate lowers the loss.
        LossError: a closure returns no number, or one that is not finite at the current weights.
    """
    closures = [closure] if callable(closure) else list(closure)
    engine = None if optimizer is None else getattr(optimizer, "engine", None)
    if engine is not None and engine.model is model and config is None and not overrides:
        return engine.suggest_lr(closures, forwards, steps)
    settings = (config or ZOConfig()).replace(**{**overrides, "lr": None})
    settings = settings.replace(normalise=bool(settings.normalise))  # for a rate that will be given as a number
    streaming = Streaming.of(model)
    if streaming is not None:  # before another engine is made, which would start with rule state of its own
        check_resident(streaming, _moving(model, settings, optimizer))
    with ExitStack() as windows:
        for live in Windows.in_model(model):
            windows.enter_context(live.kept())
        zo = ZeroOrder(model, settings, optimizer=optimizer)
        try:
            return zo.suggest_lr(closures, forwards, steps)
        finally:
            zo.close() if streaming is None else zo.stop()
            if engine is not None:
                zo.optimizer.engine = engine


def _moving(model: nn.Module, config: ZOConfig, optimizer: torch.optim.Optimizer | None) -> list[Slot]:
    """The slots that an engine with these settings would move."""
    target = resolve(config, optimizer).target.chosen(model)
    slots = target.slots(model)
    foreign = not isinstance(optimizer, ZOOptimizer)
    return slots if optimizer is None else slots_of(optimizer, slots, target.name, foreign=foreign)
