"""Checks the calls around a step: ``optimizer_step`` hooks, closures, and the torch optimizer's own ``step``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from zo_core import ConfigError, ZOOptimizer


def not_executed() -> MisconfigurationException:
    """Returns Lightning's own error for a closure that was not called."""
    return MisconfigurationException(
        "The closure hasn't been executed. HINT: did you call `optimizer_closure()` in your `optimizer_step` hook, or "
        "pass it on as `optimizer.step(closure=optimizer_closure)`? It could also happen because the optimizer's "
        "`step(closure)` did not execute it internally."
    )


class StepGuard:
    """Intercepts every call of a torch optimizer's ``step``, which only the strategy may make.

    Any other call would find no gradients and change nothing. A user-defined optimizer gets a closure,
    as it does under other strategies, and must run it exactly once.
    """

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._open = False
        self._result: Any = None
        self._depth = self._calls = 0

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Watches this optimizer from now on, and no longer the previous one."""
        self.release()
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def release(self) -> None:
        """Stops watching."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def stepping(self, result: Any = None) -> Iterator[None]:
        """A context in which the optimizer may step; ``result`` is what its closure returns."""
        self._open, self._result, self._depth = True, result, 0
        try:
            yield
        finally:
            self._open, self._result = False, None

    def _before(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._open:
            raise ConfigError(
                [
                    f"the step of {type(optimizer).__name__} was called directly, not through the strategy, "
                    "and there are no gradients; "
                    "write optimizer.step(closure=optimizer_closure) with the optimizer passed to optimizer_step"
                ]
            )
        self._depth += 1
        if not _is_foreign(optimizer):
            return None
        if self._depth == 1:
            self._calls = 0
            return args, {**kwargs, "closure": self._closure}
        if not self._calls and len(args) < 2 and kwargs.get("closure") is None:  # its step called its base class's
            raise not_executed()
        return None

    def _after(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth -= 1
        if not self._depth and not self._calls and _is_foreign(optimizer):
            raise not_executed()

    def _closure(self) -> Any:
        self._calls += 1
        if self._calls > 1:
            raise ConfigError(
                [
                    "the optimizer calls its closure more than once in a step, for gradients at other weights; a "
                    "zeroth-order step has one estimate, so choose an optimizer that needs one, like torch.optim.AdamW"
                ]
            )
        return self._result

    # These two hooks only need one gradient at a time.
    _before.per_parameter = _after.per_parameter = True  # type: ignore[attr-defined]


def _is_foreign(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its step is neither torch's nor the engine's."""
    return not type(optimizer).__module__.startswith("torch.optim") and not isinstance(optimizer, ZOOptimizer)
