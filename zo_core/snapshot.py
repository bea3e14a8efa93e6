"""A copy of what the steps of an engine change, to undo them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .errors import ConfigError
from .modes import rng_state, set_rng_state
from .offload import Streaming
from .running import Running
from .targets import Slot
from .updates.base import copies


class Snapshot:
    """A copy of what an engine's steps change: weights, rule state, rates, random generators, counters.

    It takes as much memory as the trained weights and the rule state.

    Raises:
        ConfigError: trained weights are streamed.
    """

    def __init__(self, engine: Running):
        check_resident(engine.streaming, engine.slots)
        engine.flush()
        self.engine = engine
        self.weights = [slot.tensor.data.clone() for slot in engine.slots]
        self.state = {tensor: copies(held) for tensor, held in engine.optimizer.state.items()}
        self.windows = {key: copies(kept) for key, kept in engine.updaters.saved().items()}
        self.thresholds = dict(engine.optimizer.thresholds)
        self.rates = [group["lr"] for group in engine.optimizer.param_groups]
        self.step, self.listeners, self.random = engine.step_count, engine.listeners, rng_state()
        self.first_steps, self.merged = engine.first_steps, engine.merged
        self.normaliser = None if engine.normaliser is None else engine.normaliser.saved()
        self.braking, self.brake, self.factor = engine.braking, engine.braking.saved(), engine.optimizer.factor

    def rewind(self) -> None:
        """Restores weights, rule state and random generators."""
        engine = self.engine
        engine.discard()
        engine.updaters.load(self.windows)
        for slot, kept in zip(engine.slots, self.weights, strict=True):
            slot.tensor.data.copy_(kept)
        state = engine.optimizer.state
        for tensor in [tensor for tensor in state if tensor not in self.state]:
            del state[tensor]
        for tensor, held in self.state.items():
            state[tensor] = copies(held)
        engine.optimizer.thresholds.clear()
        engine.optimizer.thresholds.update(self.thresholds)
        if engine.normaliser is not None and self.normaliser is not None:
            engine.normaliser.load(self.normaliser)
        set_rng_state(self.random)
        torch.clear_autocast_cache()

    def restore(self) -> None:
        """Restores everything."""
        self.rewind()
        engine = self.engine
        engine.at(self.step)
        engine.listeners, engine.first_steps, engine.merged = self.listeners, self.first_steps, self.merged
        engine.braking, engine.optimizer.factor = self.braking, self.factor
        engine.braking.load(self.brake)
        for group, rate in zip(engine.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate


def check_resident(streaming: Streaming | None, slots: Iterable[Slot]) -> None:
    """Raises `ConfigError` if weights that move are streamed."""
    if streaming is not None and any(streaming.home(slot.tensors) is not None for slot in slots):
        raise ConfigError(
            [
                "the range test for the learning rate keeps a copy of the weights that move, and those of this "
                "model are streamed, which is not supported; write a number for the learning rate, or train "
                "adapters, which stay resident on a streamed base"
            ]
        )
