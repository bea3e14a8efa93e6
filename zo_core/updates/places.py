"""Where the weights and the rule's state of each slot live: with the model, or in the store of a streamed block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor

from ..offload import Block, Streaming
from ..rules import UpdateRule
from ..targets import Slot

State = MutableMapping[str, Any]

#: Changes the weights and the state of one slot in place.
Work = Callable[[Tensor, State], None]


class Places:
    """The one answer to where a slot is. Everybody who asks holds this object, and `close` changes it in place.

    Args:
        optimizer: has the rule's state by tensor; None where nothing moves. For a streamed slot there are tensors
            that only stand for what is in the store, and are NaN.

    Attributes:
        streaming: what streams the model's blocks; None for a resident model.
    """

    def __init__(self, optimizer: torch.optim.Optimizer | None = None):
        self.optimizer = optimizer
        self.streaming: Streaming | None = None
        #: Of each streamed slot: by kind of state, its key in the store and the tensor that stands for it.
        self._kept: dict[Slot, dict[str, tuple[str, Tensor]]] = {}

    @property
    def states(self) -> MutableMapping[Any, State]:
        """The optimizer's, which is another one after it has loaded something."""
        return {} if self.optimizer is None else self.optimizer.state

    def home(self, slot: Slot) -> tuple[Block, str] | None:
        """The block that a slot is streamed with, and its name there; None if it is resident."""
        return None if self.streaming is None else self.streaming.home(slot.tensors)

    def device(self, slot: Slot) -> torch.device:
        """Where a slot is computed with."""
        return slot.tensor.device if self.streaming is None else self.streaming.device

    def waits(self) -> bool:
        """Whether some updates wait for their block."""
        return self.streaming is not None and any(block.pending for block in self.streaming.blocks)

    # Weights

    def values(self, slot: Slot) -> Tensor:
        """The weights as they are in memory, to be read and not written."""
        home = self.home(slot)
        return slot.tensor.data if home is None or self.streaming is None else self.streaming.state(*home)

    def load(self, slot: Slot, values: Tensor) -> None:
        """Puts other values in the place of the weights."""
        home = self.home(slot)
        if home is None or self.streaming is None:
            slot.tensor.data.copy_(values)
        else:
            self.streaming.load_state(home[0], {home[1]: values})

    def move(self, slot: Slot, work: Work) -> None:
        """Runs ``work`` on a slot: now, or when its block comes by."""
        home = self.home(slot)
        if home is None:
            state = self.states[slot.tensor]
            work(slot.tensor.data, state)
            if not state:
                del self.states[slot.tensor]
            return
        block, name = home
        keys = {kind: key for kind, (key, _) in self._kept.get(slot, {}).items()}

        def update(tensors: dict[str, Tensor]) -> None:
            work(tensors[name], {kind: tensors[key] for kind, key in keys.items()})

        block.pending.append(((name, *keys.values()), update))

    def flush(self) -> None:
        """Applies the updates that wait for their block."""
        if self.streaming is not None:
            self.streaming.flush()

    # The rule's state

    def keep(self, slots: Iterable[Slot], rule: UpdateRule) -> None:
        """Makes room in the store for what a rule keeps of streamed slots; zeros at first."""
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

    def streams_state(self, tensor: Tensor) -> bool:
        """Whether the state of this tensor travels with a block."""
        return any(tensor is slot.tensor for slot, held in self._kept.items() if held)

    def used(self) -> bool:
        """Whether there is state from earlier steps; what is streamed is there from the start, as zeros."""
        for tensor, state in self.states.items():
            held = next((held for slot, held in self._kept.items() if slot.tensor is tensor), {})
            if any(kind not in held or bool(value.any()) for kind, value in self.whole(state).items()):
                return True
        return False

    def whole(self, state: State) -> dict[str, Any]:
        """A slot's state with the stored values of what is streamed."""
        stored: dict[int, Tensor] = {}
        for slot, held in self._kept.items():
            home = self.home(slot)
            if self.streaming is None or home is None:
                continue
            for key, token in held.values():
                if any(token is value for value in state.values()):
                    stored[id(token)] = self.streaming.state(home[0], key)
        return {kind: stored.get(id(value), value) for kind, value in state.items()}

    def store(self) -> None:
        """Moves what was loaded into the optimizer's state to where it is streamed from; what is missing is zero."""
        loaded: dict[Block, dict[str, Tensor | None]] = {}
        for slot, held in self._kept.items():
            home = self.home(slot)
            if home is None:
                continue
            for kind, (key, token) in held.items():
                loaded.setdefault(home[0], {})[key] = self.states[slot.tensor].get(kind)
                self.states[slot.tensor][kind] = token
        for block, values in loaded.items():
            assert self.streaming is not None
            self.streaming.load_state(block, values)

    def bring_back(self) -> None:
        """Makes the state of streamed slots ordinary again; the weights stay where they are."""
        for slot, held in self._kept.items():
            if held:
                whole = self.whole(self.states[slot.tensor])
                self.states[slot.tensor].update({kind: whole[kind].clone() for kind in held})
        self._kept = {}

    def close(self, device: torch.device | None) -> None:
        """Everything is resident from here on; ``device`` as in `Streaming.close`."""
        if self.streaming is not None:
            self.flush()
            kept = list(self._kept)
            self.bring_back()
            self.streaming.close(device)
            self.streaming = None
            for slot in kept:  # state is beside the weights, wherever these went
                state = self.states[slot.tensor]
                state.update({kind: value.to(slot.tensor.device) for kind, value in state.items()})
