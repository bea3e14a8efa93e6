"""Where the weights and the rule's state of each slot are stored: in the model, or in the store of a streamed block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor

from ..rules import ANCHOR, UpdateRule
from ..streaming import Block, Streaming
from ..targets import Slot

State = MutableMapping[str, Any]

#: Elements of which a distance is computed at a time.
CHUNK = 1 << 20

#: Changes a slot in place: gets its weights, in their shape and dtype on the device that computes, and its state.
Work = Callable[[Tensor, State], None]


class Places:
    """The single source for where a slot is stored. All users share this object, and `close` changes it in place.

    Methods that use the store of a streamed model raise `StateError` if a block could not be read or written.

    Args:
        optimizer: holds the rule's state by tensor; None if nothing moves. For a streamed slot it holds
            placeholders of the tensors in the store, which are NaN.

    Attributes:
        streaming: the object that streams the model's blocks; None for a resident model.
    """

    def __init__(self, optimizer: torch.optim.Optimizer | None = None):
        self.optimizer = optimizer
        self.streaming: Streaming | None = None
        #: For each streamed slot, by kind of state: its key in the store and its placeholder.
        self._kept: dict[Slot, dict[str, tuple[str, Tensor]]] = {}
        #: Streamed slots whose anchor is still to become a copy of the weights, at their first update.
        self.unanchored: set[Slot] = set()

    @property
    def states(self) -> MutableMapping[Any, State]:
        """The optimizer's state, by tensor; loading a state replaces this object."""
        return {} if self.optimizer is None else self.optimizer.state

    def home(self, slot: Slot) -> tuple[Block, str] | None:
        """The block that a slot is streamed with, and its name within the block; None if it is resident."""
        return None if self.streaming is None else self.streaming.home(slot.tensors)

    def device(self, slot: Slot) -> torch.device:
        """The device on which a slot is computed."""
        return slot.tensor.device if self.streaming is None else self.streaming.device

    def waits(self) -> bool:
        """Whether updates of streamed blocks are pending."""
        return self.streaming is not None and any(block.pending for block in self.streaming.blocks)

    # Weights

    def values(self, slot: Slot) -> Tensor:
        """The weights as they are stored, in the slot's shape and dtype; do not write to them.

        Pending updates are not included. For a streamed slot the tensor is on the CPU.

        Raises:
            StateError: an earlier read or write of the slot's block has failed.
        """
        home = self.home(slot)
        return slot.tensor.data if home is None or self.streaming is None else self.streaming.state(*home)

    def load(self, slot: Slot, values: Tensor) -> None:
        """Replaces the weights.

        Args:
            slot: one of the engine's.
            values: new values in the slot's shape, on any device; they are copied, and cast to its dtype.

        Raises:
            StateError: the slot's block could not be read or written.
        """
        home = self.home(slot)
        if home is None or self.streaming is None:
            slot.tensor.data.copy_(values)
        else:
            self.streaming.load_state(home[0], {home[1]: values})

    def move(self, slot: Slot, work: Work) -> None:
        """Runs ``work`` on a slot: now, or for a streamed slot when its block is fetched next.

        Args:
            slot: one of the engine's.
            work: called with the weights, in the slot's shape and dtype, and the rule's state of the slot by
                kind, both on the slot's `device`; changes them in place.
        """
        home = self.home(slot)
        if home is None:
            tensor = slot.tensor
            known = self.states.get(tensor)
            state: State = {} if known is None else known
            work(tensor.data, state)
            if state and known is None:
                self.states[tensor] = state
            elif known is not None and not state:
                del self.states[tensor]
            return
        block, name = home
        keys = {kind: key for kind, (key, _) in self._kept.get(slot, {}).items()}
        anchors = slot in self.unanchored
        self.unanchored.discard(slot)

        def update(tensors: dict[str, Tensor]) -> None:
            if anchors:
                tensors[keys[ANCHOR]].copy_(tensors[name])
            work(tensors[name], {kind: tensors[key] for kind, key in keys.items()})

        assert self.streaming is not None
        # The weights of a checkpoint that is opened in place stay in its files, and are read from there.
        stored = anchors and not self.streaming.same_as(block, keys[ANCHOR], name)
        changed = (key for kind, key in keys.items() if stored or kind != ANCHOR)
        self.streaming.later(block, (name, *changed), update)

    def streamed(self, slots: Iterable[Slot]) -> dict[Block, list[str]]:
        """The names within their blocks of those of ``slots`` that are streamed, and of the rule's state of them."""
        names: dict[Block, list[str]] = {}
        for slot in slots:
            home = self.home(slot)
            if home is not None:
                names.setdefault(home[0], []).extend([home[1], *(key for key, _ in self._kept.get(slot, {}).values())])
        return names

    def flush(self) -> None:
        """Applies the pending updates of streamed blocks.

        Raises:
            StateError: a block could not be read or written.
        """
        if self.streaming is not None:
            self.streaming.flush()

    def moved(self, slot: Slot) -> float:
        """The square of the distance of a slot from its anchor, whose pending updates are not included."""
        theta, anchor = self.values(slot), self.whole(self.states.get(slot.tensor, {})).get(ANCHOR)
        if anchor is None:
            return 0.0
        pairs = zip(theta.reshape(-1).split(CHUNK), anchor.reshape(-1).split(CHUNK), strict=True)
        return math.fsum(float((a.double() - b.double()).square_().sum()) for a, b in pairs)

    # The rule's state

    def keep(self, slots: Iterable[Slot], rule: UpdateRule) -> None:
        """Makes room in the store for a rule's state of streamed slots, initially zeros.

        An anchor becomes a copy of the weights when these are moved first, since they may be loaded before that.

        Args:
            slots: slots of the engine; those that are resident are skipped.
            rule: `UpdateRule.state` determines the shapes and dtypes.

        Raises:
            StateError: a block could not be read or written.
        """
        for slot in slots:
            home = self.home(slot)
            if self.streaming is None or home is None:
                continue
            block, name = home
            kept = self._kept.setdefault(slot, {})
            for kind, (shape, dtype) in rule.state(slot.tensor).items():
                if kind not in kept:
                    key = f"{name}#{kind}"
                    token = self.states[slot.tensor][kind] = self.streaming.keep_state(block, key, shape, dtype)
                    kept[kind] = key, token
                    self.unanchored |= {slot} if kind == ANCHOR else set()

    def streams_state(self, tensor: Tensor) -> bool:
        """Whether the rule's state of this tensor is streamed with a block."""
        return any(tensor is slot.tensor for slot, held in self._kept.items() if held)

    def used(self) -> bool:
        """Whether there is state from earlier steps; streamed state exists from the start, as zeros."""
        for tensor, state in self.states.items():
            held = next((held for slot, held in self._kept.items() if slot.tensor is tensor), {})
            if any(kind not in held or bool(value.any()) for kind, value in self.whole(state).items()):
                return True
        return False

    def whole(self, state: State) -> dict[str, Any]:
        """A slot's state by kind, with the stored tensors (on the CPU) in place of placeholders.

        Raises:
            StateError: an earlier read or write of a block has failed.
        """
        stored: dict[int, Tensor] = {}
        for slot, held in self._kept.items():
            home = self.home(slot)
            if self.streaming is None or home is None:
                continue
            for key, token in held.values():
                if any(token is value for value in state.values()):
                    stored[id(token)] = self.streaming.state(home[0], key)
            if slot in self.unanchored and held[ANCHOR][1] is state.get(ANCHOR):
                state = {kind: value for kind, value in state.items() if kind != ANCHOR}
        return {kind: stored.get(id(value), value) for kind, value in state.items()}

    def store(self) -> None:
        """Moves what was loaded into the optimizer's state to the store of streamed slots; missing tensors become zero.

        Raises:
            StateError: a block could not be read or written.
        """
        loaded: dict[Block, dict[str, Tensor | None]] = {}
        for slot, held in self._kept.items():
            home = self.home(slot)
            if home is None:
                continue
            for kind, (key, token) in held.items():
                value = self.states[slot.tensor].get(kind)
                value = loaded.setdefault(home[0], {})[key] = None if value is token else value
                if kind == ANCHOR:
                    (self.unanchored.add if value is None else self.unanchored.discard)(slot)
                self.states[slot.tensor][kind] = token
        for block, values in loaded.items():
            assert self.streaming is not None
            self.streaming.load_state(block, values)

    def bring_back(self) -> None:
        """Puts copies of the stored state of streamed slots into the optimizer; the weights stay where they are."""
        for slot, held in self._kept.items():
            if held:
                whole = self.whole(self.states[slot.tensor])
                self.states[slot.tensor].update({kind: whole[kind].clone() for kind in held if kind in whole})
                if slot in self.unanchored:
                    del self.states[slot.tensor][ANCHOR]
        self._kept = {}
        self.unanchored.clear()

    def close(self, device: torch.device | None) -> None:
        """Makes everything resident, after applying pending updates.

        Args:
            device: where streamed parameters go; None takes the device that they computed on.

        Raises:
            StateError: a block could not be read or written.
        """
        if self.streaming is not None:
            self.flush()
            kept = list(self._kept)
            self.bring_back()
            self.streaming.close(device)
            self.streaming = None
            for slot in kept:  # state is on the device of the weights, wherever these went
                state = self.states[slot.tensor]
                state.update({kind: value.to(slot.tensor.device) for kind, value in state.items()})
