"""Finds a learning rate by trial runs that are undone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from .config import ZOConfig
from .engine import ZeroOrder
from .errors import ConfigError
from .learning_rate import LrSuggestion
from .optimizer import ZOOptimizer
from .placement import resolve, slots_of
from .streaming import Streaming
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

    Trial runs start from the same weights, with the same directions and batches. In the first one the rate doubles in
    every step until the loss rises. From there down, trials at constant rates are made, each judged by the loss on all
    batches before and after; a decrease counts if it is more than the differences between the batches explain. The
    noise of k steps at rate r moves the weights about ``r sqrt(k)`` away, so T steps at r go as far as k steps at
    ``r sqrt(T / k)``: the suggestion is the smallest rate that achieves 75% of the largest decrease, but at most
    ``sqrt(k / T)`` times the highest one that a trial of k steps endures. A last, longer run confirms it.

    Weights, rule state, random generators and modes are restored bit for bit, also after an exception.
    The test needs memory for a copy of the weights that move; for streamed weights it needs temporary files instead.

    Args:
        model: as for `ZeroOrder`.
        closure: returns the loss of one batch; better a list of them, one for each of about 8 batches,
            since one batch does not show the noise between batches.
        config: the settings for training; estimator, eps, rule and target matter.
        optimizer: the optimizer for training, if any; the rates of its groups keep their proportions.
        forwards: how many calls of closures the test may take; None takes 512.
        steps: length of the run that the rate is for; None takes 20 times the length of a trial. Without ``forwards``,
            the test may take a tenth of the forwards of the run, which have to be 512 or more.
        **overrides: fields of `ZOConfig`, taking precedence over ``config``.

    Returns:
        The rate, and the curve that it comes from; it prints as a table.

    Raises:
        ConfigError: settings are not valid, no rate lowers the loss, or a rule's state is streamed for another engine.
        SearchError: there are too few forwards, or the run is too short for a test.
        StateError: a copy of streamed weights could not be written to temporary files.
        LossError: a closure returns no number, or one that is not finite at the current weights.
    """
    closures = [closure] if callable(closure) else list(closure)
    engine = None if optimizer is None else getattr(optimizer, "engine", None)
    if engine is not None and engine.model is model and config is None and not overrides:
        return engine.suggest_lr(closures, forwards, steps)
    settings = (config or ZOConfig()).replace(**{**overrides, "lr": None})
    settings = settings.replace(normalise=settings.normalise or False)  # for a rate that will be given as a number
    streaming = Streaming.of(model)
    if streaming is not None:  # before another engine is made, which would start with rule state of its own
        check_no_state(streaming, _moving(model, settings, optimizer))
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


def check_no_state(streaming: Streaming, slots: list[Slot]) -> None:
    """Raises `ConfigError` if another engine has updates or a rule's state of streamed weights that would be lost."""
    homes = [home for slot in slots if (home := streaming.home(slot.tensors)) is not None]
    if streaming.reader is not None or any(f"{name}#" in key for block, name in homes for key in block.state):
        raise ConfigError(
            [
                "the weights that move are streamed for another engine, together with its momentum or low-rank "
                "updates, and a test with other settings would lose these; pass optimizer=zo.optimizer and no "
                "settings, or call suggest_lr before that engine is made"
            ]
        )
