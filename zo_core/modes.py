"""Saves and restores module modes and random states, so that measuring leaves no trace."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def eval_mode(model: nn.Module, *, keep: nn.Module | None = None) -> Iterator[None]:
    """A context with every submodule in eval mode; the modes are restored on exit.

    Only the ``training`` flags change: `nn.Module.eval` may be overridden with side effects.

    Args:
        model: the module.
        keep: the module whose own flag is left alone; some trainers read the model's to tell training metrics
            from evaluation metrics.
    """
    changed = [m for m in model.modules() if m.training and m is not keep]
    for module in changed:
        module.training = False
    try:
        yield
    finally:
        for module in changed:
            module.training = True


def probe_modes(model: nn.Module, *, dropout: bool, keep: nn.Module | None) -> AbstractContextManager[None]:
    """The modes that probes run in: eval mode, or with ``dropout`` the model's own except for BatchNorm."""
    return frozen_statistics(model) if dropout else eval_mode(model, keep=keep)


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """A context in which layers with running statistics (BatchNorm) are in eval mode and do not update them."""
    changed = [m for m in model.modules() if m.training and getattr(m, "running_mean", None) is not None]
    for module in changed:
        module.training = False
    try:
        yield
    finally:
        for module in changed:
            module.training = True


def modes(model: nn.Module) -> list[bool]:
    """The ``training`` flag of every module."""
    return [module.training for module in model.modules()]


def set_modes(model: nn.Module, flags: list[bool]) -> None:
    """Puts back what `modes` returned; like `eval_mode`, without calling `nn.Module.train`."""
    for module, flag in zip(model.modules(), flags, strict=True):
        if module.training != flag:
            module.training = flag


def rng_state() -> dict[str, Any]:
    """State of the global generators of random, numpy (if it is imported) and torch."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if "numpy" in sys.modules:
        state["numpy"] = sys.modules["numpy"].random.get_state()
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def same_rng(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two results of `rng_state` are the same state."""
    tensors = [(a["torch"], b["torch"]), *zip(a.get("cuda", ()), b.get("cuda", ()), strict=False)]
    numpy = [(state["numpy"][1].tobytes(), state["numpy"][2:]) if "numpy" in state else None for state in (a, b)]
    return a["python"] == b["python"] and numpy[0] == numpy[1] and all(torch.equal(x, y) for x, y in tensors)


def set_rng_state(state: dict[str, Any]) -> None:
    """Puts back what `rng_state` returned."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "numpy" in state:
        sys.modules["numpy"].random.set_state(state["numpy"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
