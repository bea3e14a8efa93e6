"""The launcher of a strategy: it takes note of what `fit` was asked for, and leaves the rest to Lightning's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


class Asked:
    """Records the ``ckpt_path`` of `fit`: if there is no checkpoint yet, Lightning replaces "last" by None afterwards.

    Attributes:
        ckpt_path: the argument of the last `fit`.
        inner: the launcher that starts the other processes; None if there is one process.
    """

    def __init__(self) -> None:
        self.ckpt_path: Any = None
        self.inner: Any = None

    @property
    def is_interactive_compatible(self) -> bool:
        """Whether it can be used in a notebook."""
        return self.inner is None or self.inner.is_interactive_compatible

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Calls a function, in other processes, too, if there are several."""
        self.ckpt_path = inspect.signature(function).bind(*args, **kwargs).arguments.get("ckpt_path")
        if self.inner is None:
            return function(*args, **kwargs)
        return self.inner.launch(function, *args, trainer=trainer, **kwargs)

    def kill(self, signum: int) -> None:
        """Passes a signal on to the other processes."""
        if self.inner is not None:
            self.inner.kill(signum)
