"""The schedule of a run that was given neither a learning rate nor a schedule: linear decay to zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import LRSchedulerConfig

from zo_core import ZOOptimizer

from .auto_lr import length


class LinearDecay(torch.optim.lr_scheduler.LambdaLR):
    """Lowers the rate linearly, from what it is now to zero after some steps."""

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int):
        super().__init__(optimizer, lambda step: max(0.0, 1.0 - step / steps))


def decay(trainer: Trainer, optimizer: torch.optim.Optimizer) -> list[LRSchedulerConfig]:
    """A scheduler for a run without a learning rate, which lowers it in every step.

    Args:
        trainer: one whose module has configured no scheduler.
        optimizer: that of the run, whose engine has set the rate.

    Returns:
        The scheduler as Lightning keeps it. Nothing if a rate was given, or if the length of the run is not known.
    """
    if not (isinstance(optimizer, ZOOptimizer) and optimizer.left):
        return []
    steps = length(trainer)
    if steps is None:
        return []
    rank_zero_info(
        f"no learning rate and no scheduler were given: the rate decays linearly to zero over {steps} steps; "
        "return a scheduler from configure_optimizers for another schedule"
    )
    return [LRSchedulerConfig(LinearDecay(optimizer, steps), interval="step")]


def kept(schedulers: list[LRSchedulerConfig], checkpoint: Mapping[str, Any]) -> list[LRSchedulerConfig]:
    """The schedulers of a run that continues from a checkpoint: without decay, if the earlier run had none."""
    if checkpoint.get("lr_schedulers"):
        return schedulers
    return [config for config in schedulers if not isinstance(config.scheduler, LinearDecay)]
