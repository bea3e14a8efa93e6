"""Warnings and errors before a run, for settings that have another meaning here."""

from __future__ import annotations

import logging
import os
from typing import Any

from torch import nn
from transformers import TrainingArguments

from zo_core import ConfigError, ModelError, ZeroOrder, ZOConfig
from zo_core.targets import group_of

logger = logging.getLogger("hf_zo")


def check_arguments(args: TrainingArguments, *, is_model_parallel: bool) -> None:
    """Checks the arguments of a trainer, and turns off settings that have no use.

    Raises:
        ConfigError: settings cannot work; the message lists all of them.
    """
    problems = []
    if args.n_gpu > 1 and not is_model_parallel:
        logger.warning(
            "this process sees %d GPUs and trains on one of them; torchrun --nproc_per_node %d uses all",
            args.n_gpu,
            args.n_gpu,
        )
        args._n_gpu = 1  # Trainer would wrap the model in DataParallel
    for name in ("deepspeed", "fsdp"):
        if getattr(args, name, None):
            problems.append(f"{name}={getattr(args, name)!r}: sharded models are not supported yet; leave it out")
    if problems:
        raise ConfigError(problems)
    for name in ("gradient_checkpointing", "activation_checkpointing"):  # two names of one setting, kept equal
        if getattr(args, name, False):
            setattr(args, name, False)
            if name == "gradient_checkpointing" and not default(args, name):
                logger.warning("%s=True has no use without a backward pass, and is switched off", name)
    if args.torch_compile:
        logger.warning(
            "torch_compile=True: each probe copies all trained weights at once instead of layer by layer, which takes "
            "memory for a second set of them"
        )
    # The filter would replace NaN by the running mean: a diverged run would look as if it continued.
    args.logging_nan_inf_filter = False
    if args.fp16 and args.device.type == "cpu":
        logger.warning("fp16=True does nothing on a CPU, the run is in the model's own precision; use bf16=True")


def check_processes(args: TrainingArguments, ranks: str | None) -> None:
    """Raises `ConfigError` if several processes were started, and the arguments make something else of them."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and args.world_size == 1 and ranks is not None:
        raise ConfigError(
            [
                f"WORLD_SIZE={started}: so many processes were started, but Trainer takes each for the only one, as "
                "it does on machines without GPUs; write use_cpu=True, or zo_ranks=None to train a model in each"
            ]
        )
    seedable = getattr(args.accelerator_config, "use_seedable_sampler", True)
    if args.world_size > 1 and ranks == "points" and not seedable:
        raise ConfigError(
            [
                "use_seedable_sampler=False in accelerator_config: each process would shuffle by random numbers of its "
                "own, and zo_ranks='points' needs the same batches in all of them; leave it out"
            ]
        )


def check_undivided(model: nn.Module | None) -> None:
    """Raises `ModelError` for a model of DTensors, whose processes Trainer would have to give the same batches."""
    if model is not None and group_of(model):
        raise ModelError(
            "the model's parameters are DTensors (tp_plan, parallelize_module), and Trainer gives batches of their own "
            "to the processes that hold parts of it; train it in a loop with zo_core.ZeroOrder (docs/ranks.md), or "
            "load the whole model in every process"
        )


def check_precision(args: TrainingArguments, config: ZOConfig) -> None:
    """Raises `ConfigError` for gradients in fp16, which would have to be scaled."""
    if args.fp16 and config.backprop is not None:
        raise ConfigError(["fp16=True with backprop: gradients in float16 underflow without a scaler; write bf16=True"])


def warn_about_numbers(args: TrainingArguments, engine: ZeroOrder) -> None:
    """Logs one line for each number that is probably meant for backpropagation."""
    if engine.backprop is None and args.max_grad_norm and args.max_grad_norm != default(args, "max_grad_norm"):
        logger.warning(
            "max_grad_norm=%g has no effect, there is no gradient to clip; zo_clip bounds the projected gradient",
            args.max_grad_norm,
        )
    if args.neftune_noise_alpha and not engine.config.dropout:
        logger.warning(
            "neftune_noise_alpha=%g has no effect, probes run in eval mode; zo_dropout=True turns noise and dropout on",
            args.neftune_noise_alpha,
        )
    if any(slot.scaling is not None for slot in engine.slots) and hasattr(engine.model, "peft_config"):
        logger.warning(
            "quantisation scales are trained as well, but PEFT saves the adapters only; save the scales with "
            "torch.save(model.state_dict(), ...), and load them with load_state_dict"
        )


def default(args: TrainingArguments, name: str) -> Any:
    """Returns the default of a field; TRL's arguments have other defaults than `TrainingArguments`."""
    return type(args).__dataclass_fields__[name].default
