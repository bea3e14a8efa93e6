"""Saves and restores module modes and random states, so that measuring leaves no trace."""

from __future__ import annotations

import operator
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
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


def modes(modules: Iterable[nn.Module]) -> list[bool]:
    """The ``training`` flag of each module."""
    return [module.training for module in modules]


def set_modes(modules: Iterable[nn.Module], flags: list[bool]) -> None:
    """Puts back what `modes` returned; like `eval_mode`, without calling `nn.Module.train`."""
    for module, flag in zip(modules, flags, strict=True):
        if module.training != flag:
            module.training = flag


def _numpy() -> Any:
    return sys.modules["numpy"].random if "numpy" in sys.modules else None


def _set_numpy(state: Any) -> None:
    if state is not None:
        _numpy().set_state(state)


def _same_numpy(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    return bool(a[1].tobytes() == b[1].tobytes() and a[2:] == b[2:])


def _set_cuda(states: Any) -> None:
    if states is not None:
        torch.cuda.set_rng_state_all(states)


def _same_cuda(a: Any, b: Any) -> bool:
    return a is b if a is None or b is None else all(map(torch.equal, a, b))


@dataclass(frozen=True)
class Generators:
    """Global random generators of one kind: how to save, restore and compare their state."""

    get: Callable[[], Any]
    put: Callable[[Any], object]
    same: Callable[[Any, Any], bool]


#: All global generators. The states of numpy and CUDA are None while they are not in use.
GENERATORS = {
    "python": Generators(random.getstate, random.setstate, operator.eq),
    "torch": Generators(torch.get_rng_state, torch.set_rng_state, torch.equal),
    "numpy": Generators(lambda: None if _numpy() is None else _numpy().get_state(), _set_numpy, _same_numpy),
    "cuda": Generators(
        lambda: torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None,
        _set_cuda,
        _same_cuda,
    ),
}


def rng_state(kinds: Iterable[str] = GENERATORS) -> dict[str, Any]:
    """State of the global generators of random, numpy (if it is imported) and torch, or of some ``kinds`` of them."""
    return {kind: GENERATORS[kind].get() for kind in kinds}


def moved_generators(a: dict[str, Any], b: dict[str, Any]) -> set[str]:
    """The kinds of generators that have different states in two results of `rng_state`."""
    return {kind for kind, state in a.items() if not GENERATORS[kind].same(state, b[kind])}


def same_rng(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two results of `rng_state` are the same state."""
    return not moved_generators(a, b)


def set_rng_state(state: dict[str, Any]) -> None:
    """Puts back what `rng_state` returned."""
    for kind, value in state.items():
        GENERATORS[kind].put(value)
