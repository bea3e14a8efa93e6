"""Batches for the range test of ``zo_learning_rate="auto"``, drawn without changing the order of the training data."""

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
    """Draws the micro-batches of `STEPS` steps as the trainer would.

    Args:
        trainer: the trainer, at its first step.
        count: number of micro-batches in a step.

    Returns:
        The micro-batches of each step with the step's number of items. An empty list for an iterable dataset,
        which may be a stream that yields each row once.
    """
    if isinstance(trainer.train_dataset, IterableDataset):
        return []
    random, known = rng_state(), list(trainer.accelerator._dataloaders)
    try:
        loader = trainer.get_train_dataloader()
        # The inner loader: accelerate's wrapper would tell the accelerator that an epoch has begun.
        rows = iter(getattr(loader, "base_dataloader", loader))
        drawn = [trainer.get_batch_samples(rows, count, trainer.args.device) for _ in range(STEPS)]
    finally:
        trainer.accelerator._dataloaders[:] = known
        set_rng_state(random)
    return [(batches, items) for batches, items in drawn if len(batches) == count]


@contextmanager
def unnoticed(trainer: Any) -> Iterator[None]:
    """A context that restores the trainer's plain attributes and TRL's metrics at its end."""
    found, metrics = Attributes(trainer), copy.deepcopy({k: v for k, v in vars(trainer).items() if k == "_metrics"})
    try:
        yield
    finally:
        found.put(trainer)
        vars(trainer).update(metrics)


def schedulers(trainer: Any) -> list[Any]:
    """Returns the trainer's scheduler, if any, without accelerate's wrapper."""
    scheduler = trainer.lr_scheduler
    return [] if scheduler is None else [getattr(scheduler, "scheduler", scheduler)]
