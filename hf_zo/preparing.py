"""What accelerate may do with a model and an optimizer of ours while it prepares a run."""

from __future__ import annotations

from typing import Any

import torch

from zo_core import ZOOptimizer
from zo_core.optimizer import TorchOptimizerFace


def leave_state(accelerator: Any) -> None:
    """Makes an accelerator leave the state of our own optimizers where it is.

    It would copy the whole ``state_dict()`` to its device and load it again. The state of streamed weights is all of
    their momentum, which has no room there; other state is already with its weights. Torch optimizers are still
    placed by accelerate.

    Args:
        accelerator: an `accelerate.Accelerator`; changed in place.
    """
    prepare = accelerator.prepare_optimizer

    def prepare_optimizer(optimizer: torch.optim.Optimizer, device_placement: bool | None = None) -> Any:
        own = isinstance(optimizer, ZOOptimizer) and not isinstance(optimizer, TorchOptimizerFace)
        return prepare(optimizer, device_placement=False if own else device_placement)

    accelerator.prepare_optimizer = prepare_optimizer


def leave_unwrapped(accelerator: Any) -> None:
    """Makes an accelerator leave the model unwrapped when there are several processes.

    `DistributedDataParallel` would keep buckets for gradients, as large as the model, and there are none.

    Args:
        accelerator: an `accelerate.Accelerator`; changed in place.
    """
    prepare = accelerator.prepare_model

    def prepare_model(model: Any, device_placement: bool | None = None, evaluation_mode: bool = False) -> Any:
        return prepare(model, device_placement=device_placement, evaluation_mode=True)

    accelerator.prepare_model = prepare_model
