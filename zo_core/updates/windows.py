"""What everybody sees of weights whose updates wait: ``W_eff``, in forwards, in state dicts, and by reading them.

Neither ends the window, so a run does not depend on who looks. For the engine's own code, in `Windows.hidden`, the
parameters show what is in memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from ..noise import LowRankDirection
from ..oracle.function_mode import ProbeMode
from ..oracle.functional import FunctionalMode, Sight
from ..oracle.scratch import ScratchPool
from ..stand_ins import ordinary, same_bits, stand_in
from ..targets import Slot
from .places import Places
from .window import Window


class Windows:
    """The windows of an engine, and the hooks by which a model counts with what waits in them.

    Args:
        model: the module that is trained.
        of: the window of each slot that has one.
        places: where slots are.
    """

    def __init__(self, model: nn.Module, of: Mapping[Slot, Window], places: Places):
        self.model, self.of, self.places = model, dict(of), places
        self.handles: list[Any] = []
        if self.of and places.streaming is not None:
            places.streaming.reader = self
        self._begin()

    def _begin(self) -> None:
        self.slots = {id(tensor): slot for slot in self.of for tensor in slot.tensors}
        self.pool = ScratchPool()
        self.entered: list[list[Any]] = []
        self.inside = 0
        #: What resident parameters pointed at before somebody read them.
        self.read: dict[Slot, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A model that is copied or pickled takes its hooks along, hence this object; its parameters were read for
        # the copy, so nothing waits there.
        return {"model": self.model, "handles": self.handles}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, of={}, places=Places())
        self._begin()

    @staticmethod
    def in_model(model: nn.Module) -> Iterator[Windows]:
        """Whoever has updates that wait for this model."""
        hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
        owners = {id(owner): owner for hook in hooks if isinstance(owner := getattr(hook, "__self__", None), Windows)}
        yield from owners.values()

    def waiting(self, slot: Slot) -> LowRankDirection | None:
        """What has to be added to the weights in memory; None for nothing."""
        return None if slot not in self.of else self.of[slot].waiting()

    def settle(self) -> None:
        """Puts everything that waits into the weights, and takes the hooks away: for the end of training.

        A run that goes on afterwards begins new windows, so its numbers differ from those without this.
        """
        with torch.no_grad(), self.hidden():
            for window in self.of.values():
                window.settle()
        for handle in self.handles:
            handle.remove()
        self.handles = []
        torch.clear_autocast_cache()

    # Reading

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """In this context the parameters show what is in memory; outside of it, who reads one sees W_eff."""
        if not self.inside:
            self._settle_read()
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1
            if not self.inside:
                self._show()

    @contextmanager
    def effective(self) -> Iterator[None]:
        """A context in which torch functions that are given a parameter compute with W_eff."""
        known = [slot for slot, window in self.of.items() if window.factor is not None]
        with self.hidden(), FunctionalMode(Sight(known, _values, self._waiting, self.pool), losses=False):
            yield

    def _waiting(self, slot: Slot) -> LowRankDirection:
        waiting = self.of[slot].waiting()
        assert waiting is not None
        return waiting

    def _show(self) -> None:
        """Makes the parameters that are behind stand-ins, and lets the model count with what waits."""
        behind = [slot for slot, window in self.of.items() if window.factor is not None]
        for slot in behind:
            if self.places.home(slot) is None and slot not in self.read:
                for tensor in slot.tensors:
                    stand_in(tensor, partial(self._bring, slot))
        if not self.handles and any(self.of[slot].moved for slot in behind):
            self._attach()

    def _bring(self, slot: Slot) -> None:
        """Somebody reads a parameter: it points at W_eff until the next step."""
        for tensor in slot.tensors:
            ordinary(tensor)
        waiting = self.of[slot].waiting()
        if waiting is None:
            return
        kept = slot.tensor.data
        self.read[slot] = kept
        sum_ = waiting.add_to(kept, out=torch.empty_like(kept))
        for tensor in slot.tensors:
            tensor.data = sum_

    def _settle_read(self) -> None:
        """What was read shows the memory of the window again; what was written, too, is where it begins anew."""
        with torch.no_grad(), torch.inference_mode(False):
            for slot in self.of:
                for tensor in slot.tensors if self.places.home(slot) is None else ():
                    ordinary(tensor)
            read, self.read = self.read, {}
            for slot, kept in read.items():
                now, waiting = slot.tensor.data, self.of[slot].waiting()
                shown = None if waiting is None else waiting.add_to(kept, out=self.pool.take(kept))
                if shown is None or not same_bits(now, shown):
                    kept.copy_(now)
                    self.of[slot].forget()
                for tensor in slot.tensors:
                    tensor.data = kept

    def corrected(self, tensor: Tensor, values: Tensor) -> Tensor:
        """What a streamed parameter counts as, given its values in the store, which are changed in place."""
        slot = self.slots.get(id(tensor))
        waiting = None if slot is None else self.of[slot].waiting()
        return values if waiting is None else waiting.add_to(values)

    def overwritten(self, tensor: Tensor) -> None:
        """A streamed parameter was given new values."""
        slot = self.slots.get(id(tensor))
        if slot is not None:
            self.of[slot].forget()

    # Forwards and state dicts

    def _attach(self) -> None:
        owners = {module for slot in self.of for module in slot.modules}
        for module in self.model.modules():
            if any(inner in owners for inner in module.modules()):
                self.handles += [
                    module.register_forward_pre_hook(self._enter, prepend=True),
                    module.register_forward_hook(self._leave, always_call=True),
                ]
            if module in owners:
                self.handles += [
                    module.register_state_dict_post_hook(partial(Windows._export, self)),
                    module.register_load_state_dict_pre_hook(self._import),
                ]

    def _enter(self, module: nn.Module, *_: Any) -> None:
        """A forward outside of a step begins; the outermost module turns the corrections on."""
        if self.entered and self.entered[-1][0] is module:
            self.entered[-1][2] += 1
        elif not any(isinstance(mode, (FunctionalMode, ProbeMode)) for mode in _get_current_function_mode_stack()):
            stack = ExitStack()
            stack.enter_context(self.effective())
            self.entered.append([module, stack, 1])

    def _leave(self, module: nn.Module, *_: Any) -> None:
        if self.entered and self.entered[-1][0] is module:
            self.entered[-1][2] -= 1
            if not self.entered[-1][2]:
                self.entered.pop()[1].close()

    def _export(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        for name, slot in self._own(module):
            kept, window = state_dict.get(prefix + name), self.of[slot]
            waiting = window.waiting()
            if kept is None or waiting is None or slot in self.read:
                continue
            copy = None if window.exported is None else window.exported()
            if copy is None:  # one copy for tied weights, which savers know by their memory
                with torch.no_grad():
                    copy = waiting.add_to(kept.detach(), out=torch.empty_like(kept).detach())
                window.exported = weakref.ref(copy)
            state_dict[prefix + name] = copy

    def _import(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Weights that are loaded are W_eff; nothing waits for them."""
        for name, slot in self._own(module):
            if prefix + name in state_dict:
                self.of[slot].forget()

    def _own(self, module: nn.Module) -> list[tuple[str, Slot]]:
        own = ((name, self.slots.get(id(parameter))) for name, parameter in module._parameters.items())
        return [(name, slot) for name, slot in own if slot is not None]


def _values(slot: Slot) -> Tensor:
    return slot.tensor  # the parameter itself, so that who differentiates W_eff gets gradients
