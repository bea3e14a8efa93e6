"""What accelerate may do with a model and an optimizer of ours while it prepares a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader

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


@contextmanager
def undivided(accelerator: Any) -> Iterator[None]:
    """A context in which an accelerator gives all batches of a loader to every process, instead of dealing them out.

    They are always shuffled by the seedable sampler: any other draws from each process's own random numbers, and the
    processes would have different batches.
    """

    def prepare(loader: Any, device_placement: bool | None = None, **how: Any) -> Any:
        return prepare_data_loader(
            loader,
            accelerator.device,
            num_processes=1,
            process_index=0,
            dispatch_batches=False,
            put_on_device=accelerator.device_placement if device_placement is None else device_placement,
            use_seedable_sampler=True,
            data_seed=accelerator.dataloader_config.data_seed,
            non_blocking=accelerator.non_blocking,
            use_stateful_dataloader=accelerator.use_stateful_dataloader,
        )

    accelerator.prepare_data_loader = prepare
    try:
        yield
    finally:
        del accelerator.prepare_data_loader  # the method of its class is there again


def run_length(trainer: Any) -> dict[str, int | None]:
    """What processes have to have in common, or some would wait for others at the end of an epoch or of the run."""
    loader = trainer.callback_handler.train_dataloader
    try:
        batches = len(loader)
    except TypeError:  # no length, or no loader yet
        batches = None
    return {"steps of the run": trainer.state.max_steps, "batches in an epoch": batches}
