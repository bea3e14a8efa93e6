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
    """Lowers the rate linearly, from what it is now to zero at the end of the run.

    Args:
        optimizer: that of the run.
        end: the step of the trainer at which the run ends.
        begin: the one at which the decay begins; a checkpoint has it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, end: int, begin: int = 0):
        self.begin = begin
        super().__init__(optimizer, lambda step: max(0.0, 1.0 - step / max(1, end - self.begin)))


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
    end = length(trainer)
    # A trainer counts on in a second `fit`. A run that is resumed takes its beginning from the checkpoint.
    begin = trainer.global_step if trainer.ckpt_path is None else 0
    if end is None or end <= begin:
        return []
    rank_zero_info(
        f"no learning rate and no scheduler were given: the rate decays linearly to zero over {end - begin} steps; "
        "return a scheduler from configure_optimizers for another schedule"
    )
    return [LRSchedulerConfig(LinearDecay(optimizer, end, begin), interval="step")]


def kept(schedulers: list[LRSchedulerConfig], checkpoint: Mapping[str, Any]) -> list[LRSchedulerConfig]:
    """The schedulers of a run that continues from a checkpoint: without decay, if the earlier run had none."""
    if checkpoint.get("lr_schedulers"):
        return schedulers
    return [config for config in schedulers if not isinstance(config.scheduler, LinearDecay)]
