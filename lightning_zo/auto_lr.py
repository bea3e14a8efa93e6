"""Batches for the range test behind ``ZOConfig(lr="auto")``, without a trace in the order of the data."""

from __future__ import annotations

from itertools import islice
from typing import Any

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, IterableDataset

from zo_core.modes import rng_state, set_rng_state

#: Number of batches that the test uses.
BATCHES = 8


def batches(trainer: Trainer) -> list[Any]:
    """A few batches of the training data on the strategy's device, as the trainer would draw them.

    Returns:
        Nothing for a loader that cannot be started a second time without disturbing the current epoch:
        of an iterable dataset, with persistent workers, or of another class than ``DataLoader``.
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


def _placed(trainer: Trainer, batch: Any) -> Any:
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
