"""Batches for the range test behind ``zo_learning_rate="auto"``, without a trace in the order of the data."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import IterableDataset

from zo_core.modes import rng_state, set_rng_state

from .attributes import Attributes

#: Number of steps whose data the test uses.
STEPS = 8


def samples(trainer: Any, count: int) -> list[tuple[list[Any], Any]]:
    """The micro-batches of a few steps, as the trainer would draw them, each with its number of items.

    Args:
        trainer: at its first step.
        count: micro-batches in a step.

    Returns:
        Nothing for an iterable dataset, which may be a stream that gives each row once.
    """
    if isinstance(trainer.train_dataset, IterableDataset):
        return []
    random, known = rng_state(), list(trainer.accelerator._dataloaders)
    try:
        loader = trainer.get_train_dataloader()
        # The loader inside: accelerate's own would tell the accelerator that an epoch has begun.
        rows = iter(getattr(loader, "base_dataloader", loader))
        drawn = [trainer.get_batch_samples(rows, count, trainer.args.device) for _ in range(STEPS)]
    finally:
        trainer.accelerator._dataloaders[:] = known
        set_rng_state(random)
    return [(batches, items) for batches, items in drawn if len(batches) == count]


@contextmanager
def unnoticed(trainer: Any) -> Iterator[None]:
    """What the trainer counts about its forwards is as before afterwards, TRL's metrics included."""
    found, metrics = Attributes(trainer), copy.deepcopy({k: v for k, v in vars(trainer).items() if k == "_metrics"})
    try:
        yield
    finally:
        found.put(trainer)
        vars(trainer).update(metrics)


def schedulers(trainer: Any) -> list[Any]:
    """The trainer's scheduler, without accelerate's wrapper."""
    scheduler = trainer.lr_scheduler
    return [] if scheduler is None else [getattr(scheduler, "scheduler", scheduler)]
