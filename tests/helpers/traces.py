"""Checks that a measurement leaves no traces: records everything about a model that is visible from outside."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zo_core.stand_ins import StandIn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of parameters and buffers."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def memory(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Ids of the parameters, with pointer and stride of those that have their values; call it before any read."""
    return {
        name: (id(p), p.requires_grad, None if isinstance(p, StandIn) else (p.data_ptr(), p.stride()))
        for name, p in model.named_parameters()
    }


def same_memory(a: dict[str, tuple[Any, ...]], b: dict[str, tuple[Any, ...]]) -> bool:
    return a.keys() == b.keys() and all(
        a[name][:2] == b[name][:2] and (None in (a[name][2], b[name][2]) or a[name][2] == b[name][2]) for name in a
    )


def same_bits(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) if isinstance(a[name], Tensor) else a[name] == b[name] for name in a
    )


def generators() -> list[bytes]:
    """The states of the global generators of torch, numpy and random."""
    return [pickle.dumps(state) for state in (torch.get_rng_state().tolist(), np.random.get_state(), random.getstate())]


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Asserts on exit, also by an exception, that weights, buffers, modes, hooks and objects are unchanged."""
    objects = memory(model)
    values = weights(model)
    modes = [module.training for module in model.modules()]
    hooks = [len(getattr(module, kind)) for module in model.modules() for kind in HOOKS]
    try:
        yield
    finally:
        assert same_memory(memory(model), objects)
        assert same_bits(weights(model), values)
        assert [module.training for module in model.modules()] == modes
        assert [len(getattr(module, kind)) for module in model.modules() for kind in HOOKS] == hooks
