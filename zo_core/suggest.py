"""The learning rate, found by trial runs that are undone."""

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
    steps: int | None = None,
    **overrides: Any,
) -> LrSuggestion:
    """A safe and useful learning rate for this model, loss and method, from forward passes only.

        batches = [next(iterator) for _ in range(8)]
        lr = suggest_lr(model, [lambda batch=batch: model(**batch).loss for batch in batches], eps=1e-3).lr

    Short trial runs start from the same weights, with the same directions and batches, at rates a
    factor of 2 apart; the loss on all batches says what each has brought. A first scan at rates that
    grow from harmless ones finds where the loss blows up. The suggestion is half of the middle one
    of the rates that bring 90% of the largest decrease, and at most a quarter of the smallest that does harm.

    Theory gives the rate only for one quadratic: with directions z and one of them a step, the expected
    change of the loss is ``-lr ||grad||^2 + lr^2 / 2 E[g^2 z'Hz]``, smallest at about ``1 / tr(H)``, and
    three losses along a z measure ``z'Hz``. One step is not enough, however, because its best rate
    knows nothing of the noise of the batches and of how the curvature changes. Trials of many steps see
    both. They are short beside a training run, which leaves less noise to the end; hence the margins.

    Weights, rule state, random generators and modes are bit for bit as before, also after an exception.
    It takes the memory of a copy of the weights that move.

    Args:
        model: as for `ZeroOrder`.
        closure: returns the loss of one batch; better a list of them, one for each of about 8 batches,
            since one batch does not show the noise between batches.
        config: the settings to be used in training: estimator, eps, rule and target matter.
        optimizer: the one to be used in training, if any; the rates of its groups keep their proportions.
        steps: length of a trial run; None takes 128 forwards, and at least 16 steps.
        **overrides: fields of `ZOConfig`, taking precedence over ``config``.

    Returns:
        The rate, and the curve it comes from; printed, a table.

    Raises:
        ConfigError: settings that cannot work, trained weights that are streamed, or no rate lowers the loss.
        LossError: a closure returns no number, or one that is not finite at the weights as they are.
    """
    closures = [closure] if callable(closure) else list(closure)
    engine = None if optimizer is None else getattr(optimizer, "engine", None)
    if engine is not None and engine.model is model and config is None and not overrides:
        return engine.suggest_lr(closures, steps)
    settings = (config or ZOConfig()).replace(**{**overrides, "lr": None})
    streaming = Streaming.of(model)
    if streaming is not None:  # before there is another engine, which would begin with rule state of its own
        check_resident(streaming, _moving(model, settings, optimizer))
    with ExitStack() as windows:
        for live in Windows.in_model(model):
            windows.enter_context(live.kept())
        zo = ZeroOrder(model, settings, optimizer=optimizer)
        try:
            return zo.suggest_lr(closures, steps)
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
