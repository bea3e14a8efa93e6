"""Where the weights and the rule's state of each slot are: with the model, or in the store of a streamed block."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .noise import Direction
from .offload import Block, Streaming
from .rules import UpdateRule
from .targets import Slot

State = MutableMapping[str, Any]

#: Changes the weights and the state of one slot in place.
Work = Callable[[Tensor, State], None]


class Homes:
    """Lets updates reach slots where they live, and checkpoints see the state of those that are streamed.

    Args:
        slots: what moves.
        optimizer: has the state by tensor. For a streamed slot there are tensors that only stand for what
            is in the store, and are NaN.
        rule: says what it keeps for a slot.
        streaming: None for a resident model.
    """

    def __init__(
        self, slots: Sequence[Slot], optimizer: torch.optim.Optimizer, rule: UpdateRule, streaming: Streaming | None
    ):
        self.optimizer, self.streaming = optimizer, streaming
        self.home: dict[Slot, tuple[Block, str]] = {}
        self.stored: dict[Slot, dict[str, tuple[str, Tensor]]] = {}
        for slot in slots:
            home = None if streaming is None else streaming.home(slot.tensors)
            if streaming is None or home is None:
                continue
            self.home[slot] = block, name = home
            self.stored[slot] = {}
            for kind, (shape, dtype) in rule.state(slot.tensor).items():
                key = f"{name}#{kind}"
                token = self.states[slot.tensor][kind] = streaming.keep_state(block, key, shape, dtype)
                self.stored[slot][kind] = key, token

    @property
    def states(self) -> MutableMapping[Any, State]:
        """The optimizer's, which is another one after it has loaded something."""
        return self.optimizer.state

    def streams(self, tensor: Tensor) -> bool:
        """Whether the state of this tensor travels with a block."""
        return any(tensor is slot.tensor for slot, held in self.stored.items() if held)

    def move(self, slot: Slot, work: Work) -> None:
        """Runs ``work`` on a slot: now, or when its block comes by."""
        if slot not in self.home:
            state = self.states[slot.tensor]
            work(slot.tensor.data, state)
            if not state:
                del self.states[slot.tensor]
            return
        block, name = self.home[slot]
        keys = {kind: key for kind, (key, _) in self.stored[slot].items()}

        def update(tensors: dict[str, Tensor]) -> None:
            work(tensors[name], {kind: tensors[key] for kind, key in keys.items()})

        block.pending.append(((name, *keys.values()), update))

    def used(self) -> bool:
        """Whether there is state from earlier steps; what is streamed is there from the start, as zeros."""
        for tensor, state in self.states.items():
            held = next((held for slot, held in self.stored.items() if slot.tensor is tensor), {})
            if any(kind not in held or bool(value.any()) for kind, value in self.whole(state).items()):
                return True
        return False

    def whole(self, state: State) -> dict[str, Any]:
        """A slot's state with the stored values of what is streamed."""
        places = {
            id(token): (self.home[slot][0], key) for slot, held in self.stored.items() for key, token in held.values()
        }
        return {
            kind: self.streaming.state(*places[id(value)])
            if self.streaming is not None and id(value) in places
            else value
            for kind, value in state.items()
        }

    def store(self) -> None:
        """Moves what was loaded into the optimizer's state to where it is streamed from; what is missing is zero."""
        loaded: dict[Block, dict[str, Tensor | None]] = {}
        for slot, held in self.stored.items():
            for kind, (key, token) in held.items():
                loaded.setdefault(self.home[slot][0], {})[key] = self.states[slot.tensor].get(kind)
                self.states[slot.tensor][kind] = token
        for block, values in loaded.items():
            assert self.streaming is not None
            self.streaming.load_state(block, values)

    def bring_back(self) -> None:
        """Makes the state of streamed slots ordinary again; the weights are the streaming's business."""
        for slot, held in self.stored.items():
            if held:
                whole = self.whole(self.states[slot.tensor])
                self.states[slot.tensor].update({kind: whole[kind].clone() for kind in held})
        self.home, self.stored = {}, {}


def by_rule(rule: UpdateRule, how: tuple[Direction, float, float], theta: Tensor, state: State) -> None:
    """The work of a rule: ``how`` is the direction, the learning rate and the weight decay."""
    rule.update(theta, state, *how)
