"""How weights with pending updates appear outside the engine: as ``W_eff``, in forwards, in state dicts and when read.

None of these ends the window, so reading weights does not change a run. For the engine's own code, in
`Windows.hidden`, the parameters show what is in memory.
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

from ..errors import StateError
from ..noise import Direction, LowRankDirection
from ..noise.low_rank import SIGNS
from ..probing.function_mode import ProbeMode
from ..probing.functional import FunctionalMode, Sight
from ..probing.scratch import ScratchPool
from ..stand_ins import ordinary, same_bits, stand_in
from ..targets import Slot
from .places import Places
from .window import Window

#: What a parameter keeps if only its values change: dtype, device, shape and strides.
Form = tuple[torch.dtype, torch.device, torch.Size, tuple[int, ...]]


class Windows:
    """The windows of an engine, and the hooks that make a model include the pending updates.

    Args:
        model: the module that is trained.
        of: the window of each slot that has one.
        places: where slots are stored.
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
        #: Whether functions compute with W_eff now.
        self.computing = False
        #: What resident parameters pointed at before they were read, and the form of what they show instead.
        self.read: dict[Slot, tuple[Tensor, Form]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A model is copied or pickled together with its hooks, hence with this object; its parameters were read for
        # the copy, so nothing is pending there.
        return {"model": self.model, "handles": self.handles}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, of={}, places=Places())
        self._begin()

    @staticmethod
    def in_model(model: nn.Module) -> Iterator[Windows]:
        """All windows with hooks on this model, which may have pending updates."""
        hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
        owners = {id(owner): owner for hook in hooks if isinstance(owner := getattr(hook, "__self__", None), Windows)}
        yield from owners.values()

    def waiting(self, slot: Slot) -> LowRankDirection | None:
        """The pending updates, to be added to the weights in memory; None if there are none."""
        return None if slot not in self.of else self.of[slot].waiting()

    @property
    def written(self) -> bool:
        """Whether pending updates were ever merged into the weights: these are then not what the run began with."""
        return any(window.written for window in self.of.values())

    @written.setter
    def written(self, value: bool) -> None:
        for window in self.of.values():
            window.written = value

    def settle(self) -> bool:
        """Merges all pending updates into the weights, and removes the hooks: for the end of training.

        A run that continues afterwards begins new windows, so its numbers differ from those without this.

        Returns:
            Whether anything was pending.
        """
        with torch.no_grad(), self.hidden():
            waited = [window.settle() for window in self.of.values()]
        for handle in self.handles:
            handle.remove()
        self.handles = []
        torch.clear_autocast_cache()
        return any(waited)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """A context in which another engine may move the resident weights; at its end the windows are restored."""
        with self.hidden():
            waiting = [w for slot, w in self.of.items() if self.places.home(slot) is None and w.factor is not None]
            before = [(window, window.places.values(window.slot).clone(), dict(vars(window))) for window in waiting]
        try:
            yield
        finally:
            with torch.no_grad(), self.hidden():
                for window, weights, state in before:
                    window.places.load(window.slot, weights)
                    vars(window).update(state)

    # Reading

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """A context in which the parameters show what is in memory; outside of it, reading one gives W_eff.

        Raises:
            StateError: a forward outside of a step, or `effective`, computes with W_eff.
        """
        self._check_idle()
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
        """A context in which torch functions with a parameter as an argument compute with W_eff."""
        if self.computing:
            yield
            return
        with self.hidden():  # which drops the updates of parameters that were written
            known = [slot for slot, window in self.of.items() if window.factor is not None]
            self.computing = True
            try:
                with FunctionalMode(Differentiable(known, _values, self._waiting, self.pool), losses=False):
                    yield
            finally:
                self.computing = False

    def _waiting(self, slot: Slot) -> Direction:
        waiting = self.of[slot].waiting()  # none if a streamed parameter was written, which its block finds out
        return Direction(SIGNS, slot.key, ()) if waiting is None else waiting

    def _check_idle(self) -> None:
        """Raises `StateError` where functions on parameters get copies, so that what is written to these is lost."""
        if self.computing:
            raise StateError(
                "an engine with pending low-rank updates cannot be stepped, closed or saved, and its model cannot be "
                "loaded, inside of zo.effective() or of a forward; do it after that"
            )

    def _show(self) -> None:
        """Makes stand-ins of the parameters with pending updates, and attaches the hooks that include these."""
        behind = [slot for slot, window in self.of.items() if window.factor is not None]
        for slot in behind:
            if self.places.home(slot) is None and slot not in self.read:
                for tensor in slot.tensors:
                    stand_in(tensor, partial(self._bring, slot))
        if not self.handles and any(self.of[slot].moved for slot in behind):
            self._attach()

    def _bring(self, slot: Slot) -> None:
        """Called when a parameter is read: points it at W_eff until the next step."""
        for tensor in slot.tensors:
            ordinary(tensor)
        waiting = self.of[slot].waiting()
        if waiting is None:
            return
        kept = slot.tensor.data
        sum_ = waiting.add_to(kept, out=torch.empty_like(kept))
        self.read[slot] = kept, _form(sum_)
        for tensor in slot.tensors:
            tensor.data = sum_

    def _settle_read(self) -> None:
        """Points parameters that were read at the window's memory; one that was also written starts over from there.

        One that was converted, moved to another device or reshaped stays as it is, and starts over from that.
        """
        with torch.no_grad(), torch.inference_mode(False):
            for slot in self.of:
                for tensor in slot.tensors if self.places.home(slot) is None else ():
                    ordinary(tensor)
            read, self.read = self.read, {}
            for slot, (kept, form) in read.items():
                if any(_form(tensor.data) != form for tensor in slot.tensors):
                    self.of[slot].forget()
                    continue
                now, waiting = slot.tensor.data, self.of[slot].waiting()
                shown = None if waiting is None else waiting.add_to(kept, out=self.pool.take(kept))
                if shown is None or not same_bits(now, shown):
                    kept.copy_(now)
                    self.of[slot].forget()
                for tensor in slot.tensors:
                    tensor.data = kept

    def corrected(self, tensor: Tensor, values: Tensor) -> Tensor:
        """The values of a streamed parameter with pending updates, given those in the store, which change in place."""
        slot = self.slots.get(id(tensor))
        waiting = None if slot is None else self.of[slot].waiting()
        return values if waiting is None else waiting.add_to(values)

    def overwritten(self, tensor: Tensor) -> None:
        """Called when a streamed parameter was given new values; drops its pending updates."""
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
        """Called when a forward outside of a step begins; the outermost module turns the corrections on."""
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
        """Drops the pending updates of weights that are loaded, which are W_eff."""
        for name, slot in self._own(module):
            if prefix + name in state_dict:
                self._check_idle()
                self.of[slot].forget()

    def _own(self, module: nn.Module) -> list[tuple[str, Slot]]:
        own = ((name, self.slots.get(id(parameter))) for name, parameter in module._parameters.items())
        return [(name, slot) for name, slot in own if slot is not None]


def _form(tensor: Tensor) -> Form:
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride()


class Differentiable(Sight):
    """W_eff such that its gradients go to the parameters. Where no graph is recorded it is an ordinary `Sight`.

    A graph holds the weights in memory, not the parameter, which points at W_eff when it is read before the backward.
    """

    def factors(self, slot: Slot, dtype: torch.dtype) -> tuple[Tensor, Tensor, float] | None:
        found = super().factors(slot, dtype)
        # The product with the weights in memory gives ``decay`` times their gradient, which is that of W_eff.
        return None if found is not None and found[2] != 1.0 and _recorded(slot) else found

    def copy(self, slot: Slot) -> Tensor:
        copy = super().copy(slot)
        return Through.apply(slot.tensor, copy) if _recorded(slot) else copy


class Through(torch.autograd.Function):
    """Values that a parameter stands for, whose gradient is its own."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _recorded(slot: Slot) -> bool:
    return torch.is_grad_enabled() and slot.tensor.requires_grad


def _values(slot: Slot) -> Tensor:
    return torch.ops.aten.alias(slot.tensor) if _recorded(slot) else slot.tensor
