"""The schedule of a run that was given neither a learning rate nor a schedule: linear decay to zero."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import LRSchedulerConfig

from zo_core import ZOOptimizer

from .auto_lr import length


def decay(trainer: Trainer, optimizer: torch.optim.Optimizer) -> list[LRSchedulerConfig]:
    """A scheduler that lowers the rate in every step, from what it is now to zero at the end of the run.

    Args:
        trainer: one whose module has configured no scheduler.
        optimizer: that of the run, whose engine has set the rate.

    Returns:
        The scheduler as Lightning keeps it. Nothing if a rate was given, or if the length of the run is not known.
    """
    if not (isinstance(optimizer, ZOOptimizer) and optimizer.left):
        return []
    try:
        steps = length(trainer)
    except MisconfigurationException:  # the number of batches per step changes from epoch to epoch
        return []
    if steps is None:
        return []
    rank_zero_info(
        f"no learning rate and no scheduler were given: the rate decays linearly to zero over {steps} steps; "
        "return a scheduler from configure_optimizers for another schedule"
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1.0 - step / steps))
    return [LRSchedulerConfig(scheduler, interval="step")]
