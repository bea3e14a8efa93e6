"""Batches for the range test of ``ZOConfig(lr="auto")``, drawn without changing the order of the training data."""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, IterableDataset

from zo_core.modes import rng_state, set_rng_state

#: Number of batches that the test uses.
BATCHES = 8


def batches(trainer: Trainer) -> list[Any]:
    """Draws up to `BATCHES` batches of the training data as the trainer would.

    Returns:
        The batches, on the strategy's device. An empty list if a second iterator of the loader would disturb
        the current epoch: it has an iterable dataset or persistent workers, or is not a ``DataLoader``.
    """
    loader: Any = trainer.train_dataloader
    if (
        not isinstance(loader, DataLoader)
        or isinstance(loader.dataset, IterableDataset)
        or (loader.num_workers and loader.persistent_workers)
    ):
        return []
    sampler = loader.batch_sampler if loader.sampler is None else loader.sampler
    generators = [g for g in (loader.generator, getattr(sampler, "generator", None)) if g is not None]
    random, states = rng_state(), [generator.get_state() for generator in generators]
    try:
        return [_placed(trainer, batch) for batch in islice(iter(loader), BATCHES)]
    finally:
        set_rng_state(random)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def length(trainer: Trainer) -> int | None:
    """Number of steps of the run; None if it has no limit, or only one that is not known in advance."""
    steps = trainer.estimated_stepping_batches
    return int(steps) if 0 < steps < math.inf else None  # it is -1 for iterable datasets without max_steps


def _placed(trainer: Trainer, batch: Any) -> Any:
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
