"""Checks the settings of an engine against its optimizer and model, and sets up streaming."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import lru_cache

import torch
from torch import nn

from .backprop import Backprop
from .beside_streamed import staying
from .config import AUTO, Resolved, ZOConfig
from .errors import ConfigError, ModelError
from .exchange import Exchange
from .noise import NOISES
from .optimizer import ZOOptimizer, check_optimizer
from .ranks import Ranks
from .rules import RULES, Torch, UpdateRule
from .sizes import parse_bytes
from .streaming import Streaming, offload
from .targets import TARGETS, Slot
from .updates import changes_often

logger = logging.getLogger(__name__)

NAMES = {"lr": "learning rate", "weight_decay": "weight decay"}


def resolve(config: ZOConfig, optimizer: torch.optim.Optimizer | None, model: nn.Module | None = None) -> Resolved:
    """The components of a configuration, checked against the optimizer that comes with it.

    Args:
        config: the settings.
        optimizer: the optimizer that was passed; None if the engine makes its own.
        model: the model that is trained; if it computes on CUDA, kernels are tried out before they are chosen for it.

    Raises:
        ConfigError: they do not fit together.
    """
    check_optimizer(optimizer)
    foreign = optimizer is not None and not isinstance(optimizer, ZOOptimizer)
    rates = config.lr != AUTO and optimizer is not None and not (isinstance(optimizer, ZOOptimizer) and optimizer.left)
    settings = config.resolve(has_optimizer=foreign, has_rates=foreign or rates)
    in_groups = () if optimizer is None else ("lr", "weight_decay") if foreign else ("lr", "weight_decay", "eps")
    twice = [name for name in in_groups if getattr(config, name) not in (getattr(ZOConfig, name), AUTO)]
    if twice:
        raise ConfigError(
            [
                f"{name}={getattr(config, name)!r} was given together with an optimizer, whose groups hold "
                f"the {NAMES.get(name, name)}; write it there"
                for name in twice
            ]
        )
    if config.backend == "auto" and settings.backend == "triton" and model is not None:
        device = _cuda_device(model, config)
        if device is not None and not triton_works(device):
            settings = replace(settings, backend="eager")
    return settings


def _cuda_device(model: nn.Module, config: ZOConfig) -> torch.device | None:
    """The CUDA device on which a model computes or will compute; None if there is none."""
    streaming = Streaming.of(model)
    given = [] if config.device is None else [torch.device(config.device)]
    known = [*given, *([] if streaming is None else [streaming.device]), *(p.device for p in model.parameters())]
    return next((device for device in known if device.type == "cuda"), None)


@lru_cache(maxsize=16)
def triton_works(device: torch.device) -> bool:
    """Whether Triton can compile and run a kernel of ours on a device; if not, says so once.

    The package alone is not enough: it calls a C compiler and needs the headers of Python.
    """
    try:
        _try_kernel(device)
    except Exception as error:
        logger.warning(
            "Triton cannot run a kernel on %s (%s: %s), so eager torch computes the noise, with the same bits, in more "
            "time; with a C compiler and Python's headers it can, and backend='eager' leaves out the trial",
            device,
            type(error).__name__,
            (str(error).strip() or "without a message").splitlines()[0],
        )
        return False
    return True


def _try_kernel(device: torch.device) -> None:
    from .noise.triton_backend import try_out

    try_out(device)


def check_streamable(config: ZOConfig, rule: UpdateRule) -> None:
    """Raises `ConfigError` for settings that a streamed model cannot have."""
    problems = []
    if isinstance(rule, Torch):
        problems.append(
            "a streamed model needs a rule that works on one layer at a time; leave out the optimizer, or offload"
        )
    if config.stack_probes:
        problems.append("stack_probes=True has no use with a streamed model, whose probes share a sweep; leave it out")
    if problems:
        raise ConfigError(problems)


def slots_of(optimizer: torch.optim.Optimizer, slots: list[Slot], target: str, *, foreign: bool) -> list[Slot]:
    """The slots whose tensors an optimizer holds, each with the tensor that the optimizer holds first.

    Args:
        optimizer: its groups determine what moves.
        slots: the slots that the target found.
        target: name of the target.
        foreign: whether a torch optimizer does the updates.

    Raises:
        ConfigError: the slots are scales, which a torch optimizer would make negative.
        ModelError: the optimizer holds none of the slots.
    """
    if foreign and any(slot.scaling is not None for slot in slots):
        raise ConfigError(
            [
                f"target={target!r} moves scales that must stay positive, which a torch optimizer does not "
                "know; leave out the optimizer and choose a rule (rule='momentum'), or write target='trainable'"
            ]
        )
    held = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
    chosen = [slot.led_by(held) for slot in slots if any(id(tensor) in held for tensor in slot.leads)]
    for slot in slots:
        other = next((t for t in slot.tensors[len(slot.leads) :] if t.requires_grad and id(t) in held), None)
        if other is not None and not any(id(tensor) in held for tensor in slot.leads):
            raise ModelError(
                f"the optimizer holds a parameter of shape {list(other.shape)} that shows the memory of {slot.key!r}, "
                f"of shape {list(slot.tensor.shape)}, in another order, but not {slot.key!r} itself, by whose elements "
                "this memory moves; give it both"
            )
    if not chosen:
        raise ModelError(
            "none of the optimizer's tensors is a trainable parameter of the model; build the optimizer from "
            "this model's parameters (after moving or wrapping the model), or leave it out"
        )
    return chosen


def backprop_of(config: ZOConfig, exchange: Exchange) -> Backprop | None:
    """What moves weights by backpropagation; None without the setting.

    Raises:
        ConfigError: processes hold parts of one model.
    """
    if config.backprop is None:
        return None
    if isinstance(exchange, Ranks) and exchange.units < exchange.size:
        raise ConfigError(
            [
                "backprop differentiates whole weights, and several processes hold the parts of one model here; leave "
                "out backprop, or load the whole model in every process"
            ]
        )
    return Backprop(config.backprop, config.backprop_lr, config.weight_decay)


def offload_model(
    model: nn.Module, config: ZOConfig, slots: list[Slot], device: torch.device | None = None
) -> Streaming | None:
    """Streams a model according to ``config``; ``device`` is used if that names none."""
    assert config.offload is not None
    noise = NOISES.resolve(config.noise)
    streaming = offload(
        model,
        config.offload,
        config.offload_dir,
        config.blocks,
        {id(tensor) for slot in slots for tensor in slot.tensors},
        {id(tensor) for slot in slots if slot.region or changes_often(noise, slot) for tensor in slot.tensors}
        | staying(model, config.backprop, config.blocks),
        device=device if config.device is None else torch.device(config.device),
        memory=parse_bytes(config.device_memory),
        state=_state_bytes(config, slots),
    )
    TARGETS.resolve(config.target).chosen(model).relink(slots)  # what is resident has moved
    return streaming


def _state_bytes(config: ZOConfig, slots: list[Slot]) -> int:
    """Bytes of a rule's state for all slots."""
    if config.rule == "auto":
        return 0
    kept = (RULES.resolve(config.rule).state(slot.tensor).values() for slot in slots)
    return sum(shape.numel() * dtype.itemsize for each in kept for shape, dtype in each)
