"""A copy of what the steps of an engine change, to undo them."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..errors import StateError
from ..files import removed_with
from ..forward_state import ForwardState
from ..modes import rng_state, set_rng_state
from ..running import Running
from ..sizes import human
from ..streaming import Block, DiskStore, Streaming
from ..updates.base import copies

logger = logging.getLogger(__name__)

#: Attributes of an engine that steps change, besides its step count. What is new in an engine and changed by steps
#: belongs here; values are copied.
CHANGED_BY_STEPS = ("merged", "written", "normaliser", "curves")
#: Attributes that a test of the engine sets for its own steps.
SET_BY_TESTS = ("listeners", "first_steps", "look")


class Snapshot:
    """A copy of what an engine's steps change: weights, rule state, rates, random generators, counters, buffers.

    It takes as much memory as the resident trained weights and the rule's state. Those that are streamed are kept in
    temporary files, in ``offload_dir`` if that is set, until the object is deleted.

    Raises:
        StateError: the files could not be written; nothing has changed.
    """

    def __init__(self, engine: Running):
        engine.flush()
        self.engine = engine
        places = engine.places
        names = places.streamed(engine.slots)
        self.streamed = None
        if engine.streaming is not None and names:
            self.streamed = _Files(engine.streaming, names, engine.config.offload_dir)
        with engine.hidden():
            self.weights = [(slot, slot.tensor.data.clone()) for slot in engine.slots if places.home(slot) is None]
        self.unanchored = set(places.unanchored)
        self.state = {t: dict(h) if places.streams_state(t) else copies(h) for t, h in engine.optimizer.state.items()}
        self.windows = {
            key: copies({name: value for name, value in kept.items() if name != "weights"})
            for key, kept in engine.updaters.saved().items()
        }
        self.thresholds = dict(engine.optimizer.thresholds)
        self.rates = [group["lr"] for group in engine.optimizer.param_groups]
        self.braking, self.brake, self.factor = engine.braking, engine.braking.saved(), engine.optimizer.factor
        self.step, self.whole, self.random = engine.step_count, engine.continuity.whole, rng_state()
        self.changed = {name: copy.deepcopy(getattr(engine, name)) for name in CHANGED_BY_STEPS}
        self.others = {name: getattr(engine, name) for name in SET_BY_TESTS}
        self.backprop = None if engine.backprop is None else engine.backprop.copied()
        state = engine.oracle.state
        self.forward = ForwardState(engine.model, state.moving, state.carried)
        with engine.hidden():
            self.forward.begin()

    def rewind(self) -> None:
        """Restores weights, rule state, random generators, and what else decides the next steps.

        Raises:
            StateError: a streamed block could not be read or written.
        """
        engine = self.engine
        engine.discard()
        with torch.no_grad(), engine.hidden():
            if self.streamed is not None:
                self.streamed.restore()
            for slot, kept in self.weights:
                slot.tensor.data.copy_(kept)
            engine.updaters.load_windows(self.windows)
            self.forward.rewind()
        if engine.backprop is not None and self.backprop is not None:
            engine.backprop.put_back(self.backprop)
        state = engine.optimizer.state
        for tensor in [tensor for tensor in state if tensor not in self.state]:
            del state[tensor]
        for tensor, held in self.state.items():
            state[tensor] = dict(held) if engine.places.streams_state(tensor) else copies(held)
        engine.places.unanchored = set(self.unanchored)
        engine.optimizer.thresholds.clear()
        engine.optimizer.thresholds.update(self.thresholds)
        for name, value in self.changed.items():
            setattr(engine, name, copy.deepcopy(value))
        set_rng_state(self.random)
        torch.clear_autocast_cache()

    def restore(self) -> None:
        """Restores everything.

        Raises:
            StateError: a streamed block could not be read or written.
        """
        self.rewind()
        engine = self.engine
        engine.at(self.step)
        for name, value in self.others.items():
            setattr(engine, name, value)
        engine.braking, engine.optimizer.factor = self.braking, self.factor
        engine.braking.load(self.brake)
        for group, rate in zip(engine.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate
        engine.flush()
        engine.continuity.whole = self.whole


class _Files:
    """Tensors of streamed blocks in files, one per block.

    Args:
        streaming: streams the blocks; nothing is pending.
        names: the tensors to keep of each block.
        folder: for the files; None takes the system's folder for temporary files.

    Raises:
        StateError: they could not be written; none is left.
    """

    def __init__(self, streaming: Streaming, names: Mapping[Block, Sequence[str]], folder: str | None):
        self.streaming = streaming
        specs = [block.specs[name] for block, kept in names.items() for name in kept]
        size = sum(shape.numel() * dtype.itemsize for shape, dtype in specs)
        try:
            if folder is not None:
                Path(folder).mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix="zo-snapshot-", dir=folder))
        except OSError as error:
            raise _no_room(size, folder, error) from error
        self.remove = removed_with(self, self.folder)
        self.kept = DiskStore(self.folder)
        try:
            for block, kept in names.items():
                stored = streaming.stored(block)
                self.kept.put(block.name, {name: stored[name] for name in kept})
        except StateError as error:
            self.remove()
            raise _no_room(size, folder, error) from error
        logger.info("%s of streamed weights are kept in %s meanwhile", human(size), self.folder)

    def restore(self) -> None:
        """Puts the tensors back in place of pending updates; in blocks that processes share, as an update of all."""
        shared = False
        for block in [block for block in self.streaming.blocks if block.name in self.kept.pieces]:
            self.streaming.settle(block)
            if self.streaming.store.shares(block.name):
                self.streaming.later(block, tuple(self.kept.pieces[block.name]), partial(self._put_back, block.name))
                shared = True
            else:
                block.pending.clear()
                self.streaming.load_state(block, dict(self.kept.mapped(block.name)))
        if shared:  # what was pending must not change thresholds that are put back next
            self.streaming.flush()

    def _put_back(self, block: str, tensors: dict[str, Tensor]) -> None:
        for name, kept in self.kept.mapped(block).items():
            tensors[name].copy_(kept)


def _no_room(size: int, folder: str | None, error: Exception) -> StateError:
    return StateError(
        f"a copy of the streamed weights, {human(size)}, could not be written to {folder or tempfile.gettempdir()}: "
        f"{error}; the weights are as before. Free some space, or set offload_dir to a folder on another disk"
    )
