"""The interface of the engine for modules that work with a whole engine, so that they need not import it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from .config import ZOConfig
from .exchange import Exchange
from .first_steps import FirstSteps
from .noise import Direction
from .normaliser import Normaliser
from .optimizer import Driver, ZOOptimizer
from .probing import ResidentOracle
from .records import StepRecord
from .streaming import LockstepOracle, Streaming
from .targets import Slot, Target


class Running(Driver, Protocol):
    """An engine, while it runs; see `ZeroOrder` for its attributes."""

    model: nn.Module
    config: ZOConfig
    slots: list[Slot]
    trainable: list[Tensor]
    oracle: ResidentOracle | LockstepOracle
    step_count: int
    num_probes: int
    own_probes: int
    first_steps: FirstSteps | None
    look: Any
    around: Callable[[], AbstractContextManager[Any]]
    listeners: list[Callable[[StepRecord], object]]
    followers: list[Callable[[], object]]
    regroup: Callable[[list[Slot]], object]
    normaliser: Normaliser | None
    optimizer: ZOOptimizer
    exchange: Exchange
    facts: dict[str, Any]

    @property
    def target(self) -> Target: ...

    @property
    def query_failed(self) -> str: ...

    @property
    def point_count(self) -> int: ...

    @property
    def most_points(self) -> int: ...

    @property
    def streaming(self) -> Streaming | None: ...

    def losses(self, closures: Sequence[Callable[[], Any]]) -> list[list[Tensor]]: ...

    def add(self, losses: Sequence[Tensor]) -> None: ...

    def apply(self) -> StepRecord: ...

    def discard(self) -> None: ...

    def direction(self, slot: Slot, seed: int) -> Direction: ...

    def effective(self) -> AbstractContextManager[None]: ...

    def hidden(self) -> AbstractContextManager[None]: ...

    def choose(self) -> list[Slot]: ...

    def take(self, slots: list[Slot]) -> None: ...

    def stop(self) -> None: ...
