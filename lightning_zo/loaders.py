"""Training data of several processes: it ends in all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from zo_core import ZeroOrder


class EndingTogether:
    """A loader whose length is not known, and whose iterators end as soon as that of one process has ended.

    Args:
        loader: the loader of this process; its other attributes are there, too.
        engine: returns the engine of the run, at the start of an epoch.
    """

    def __init__(self, loader: Any, engine: Callable[[], ZeroOrder | None]):
        self._loader, self._engine = loader, engine

    def __iter__(self) -> Iterator[Any]:
        engine = self._engine()
        assert engine is not None, "the strategy makes it before the first epoch"
        return engine.batches(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_loader"], name)
