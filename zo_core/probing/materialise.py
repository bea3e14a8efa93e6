"""Realising a probe with scratch copies: ``theta + scale * z`` exists one layer at a time.

Nothing is ever perturbed in place, so nothing has to be undone: a weight's own memory is not
written during a probe. During a module's forward its parameters point at perturbed copies;
otherwise they point at NaN. If other code uses a parameter in between, the call of the torch
function is intercepted and the parameter gets its copy there; a use that Python cannot see gives a
NaN loss, never a silently wrong one.

Intercepting every torch function, and copying weight by weight, takes the host longer than a GPU takes for a small
layer. So the first probe looks at the repeated layers of the model. Where one uses only weights of its own, functions
are not intercepted in later probes, and on a GPU all its weights are copied when its forward begins. If such a layer
then uses another weight after all, the loss is NaN, and the oracle measures again and intercepts everything.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StateError
from ..noise import Direction
from ..noise.changes import together
from ..records import Point
from ..targets import Slot
from .layers import Layer, layers_of
from .scratch import ScratchPool, nan_like
from .view import Originals, ProbeView, point_at


class Materialised:
    """Runs code with the slots of a model perturbed.

    Args:
        model: the module that the closures call.
        slots: what is perturbed.
        direction: called with a slot and a point, returns the `Direction` from the slot's weights in memory
            to the weights at that point: ``scale * z``, and pending updates.
        repeated: the repeated layers of the model.

    Attributes:
        whole: copy everything at the start of the probe instead of layer by layer; needs memory for
            a second set of the slots, and works for modules whose code Python cannot see.
        used: whether any probe so far has used a slot.
        running: what the running probe sees; None while none runs, or all wait.
        around: runs what adds or removes hooks on the model's modules.
        stays: whether the memory of a slot keeps its values for as long as a probe may see them.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: list[Slot],
        direction: Callable[[Slot, Point], Direction],
        repeated: Sequence[nn.Module] = (),
    ):
        self.model, self.slots, self.direction = model, slots, direction
        self.whole = any(is_compiled(module) for module in model.modules())
        self.used = False
        self.pool = ScratchPool()
        self.layers = layers_of(repeated, slots)
        self.absent = {id(tensor): slot for slot in slots for tensor in slot.tensors}
        self.nothing: Originals = {}
        self.running: ProbeView | None = None
        self._thread = 0
        self.around: Callable[[Callable[[], None]], None] = lambda change: change()
        self.stays: Callable[[Slot], bool] = lambda slot: True
        self._handles: list[Any] = []
        self._careful = False
        self._hooked = self._modules_to_hook()

    @property
    def unobserved(self) -> bool:
        """Whether probes run without looking at all torch functions."""
        return not (self._careful or self.whole) and any(layer.unobserved for layer in self.layers.values())

    def be_careful(self, careful: bool) -> None:
        """Looks at every torch function from now on, or else where earlier probes have shown that it is needed."""
        self._careful = careful
        self.unhook()

    @contextmanager
    def measuring(self, slots: Sequence[Slot] | None = None) -> Iterator[Originals]:
        """A context for probes: parameters point at NaN wherever a probe does not point them at copies.

        Args:
            slots: those that are in memory; None for all. The others point at NaN already.

        Yields:
            The values of these slots.
        """
        slots = self.slots if slots is None else slots
        # In eval mode torch has kernels for whole attention layers, except where somebody looks at torch functions.
        fast = torch.backends.mha.get_fastpath_enabled()
        originals = {slot: [tensor.data for tensor in slot.tensors] for slot in slots}
        known: dict[object, Tensor] = {}
        self.nothing = {slot: [_nothing(known, slot, tensor) for tensor in slot.tensors] for slot in self.slots}
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            point_at({slot: self.nothing[slot] for slot in slots})
            yield originals
        finally:
            self.unhook()
            torch.backends.mha.set_fastpath_enabled(fast)
            point_at(originals)
            self.nothing, self.running = {}, None
            self.pool.end()

    @contextmanager
    def at(self, point: Point, originals: Originals) -> Iterator[None]:
        """A context in which the model computes with ``theta + point.scale * z(point.seed)``.

        Args:
            point: where to measure.
            originals: what `measuring` has yielded.
        """
        view = self.view(point, lambda slot: originals[slot][0])
        self.run(view)
        try:
            if not self.moves(point):
                view.absent.clear()
                point_at(originals)
            elif self.whole:
                with together():
                    for slot in self.slots:
                        view.materialise(slot)
            else:
                self.hook()
            with view.mode():
                yield
            self.learn(view)
            if view.looks:
                self.hook()  # as it is done from now on; while probes wait, hooks see who calls the model
        finally:
            self.running = None
            view.end()
            if not self.moves(point):
                point_at(self.nothing)

    def run(self, view: ProbeView) -> None:
        """Says that this thread continues with a probe."""
        self.running, self._thread = view, threading.get_ident()

    def moves(self, point: Point) -> bool:
        """Whether the weights at a point differ from those in memory."""
        return point.scale != 0.0

    def view(self, point: Point, original: Callable[[Slot], Tensor]) -> ProbeView:
        """What the probe at a point sees; ``original`` returns the values of a slot in memory."""
        return ProbeView(self, point, original)

    def learn(self, view: ProbeView) -> None:
        """Takes over what a probe has seen, after its end."""
        self.used |= view.used
        for layer, look in view.looks.items():
            layer.learn(look, view.outside)
        if view.looks:
            self.unhook()

    # Hooks

    def hook(self) -> None:
        """Notifies the running probe of the beginning and end of modules' forwards, until `unhook`."""
        if not self._handles:
            self.around(self._hook)

    def unhook(self) -> None:
        """Removes the hooks."""
        if self._handles:
            self.around(self._unhook)

    def _hook(self) -> None:
        within: set[nn.Module] = set()
        for module, own in self._hooked:
            if module in within:
                continue
            layer = self.layers.get(module)
            if layer is not None and layer.at_once and not self._careful:
                within.update(module.modules())
                own = layer.rest
            self._handles.append(module.register_forward_pre_hook(self._enter(layer, own), prepend=True))
            self._handles.append(module.register_forward_hook(self._leave(), always_call=True))

    def _unhook(self) -> None:
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.remove()

    # Hooks are plain functions: a closure may copy the model, and with a bound method it would copy this object.

    def _enter(self, layer: Layer | None, own: list[Slot]) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            view = self._running_here()
            if view is None:
                raise StateError(
                    "the closure calls the model in a task or a thread of its own, such as one of asyncio.gather, "
                    "asyncio.create_task or asyncio.to_thread, where the weights of its probe are not; call the model "
                    "in the closure itself, and await a coroutine that calls it directly"
                )
            if layer is None:
                view.enter(own)
            else:
                view.begin(layer, own, self._careful)

        return enter

    def _leave(self) -> Callable[..., None]:
        def leave(*_: Any) -> None:
            view = self._running_here()
            if view is not None:  # otherwise nothing was entered
                view.leave()

        return leave

    def _running_here(self) -> ProbeView | None:
        return self.running if self._thread == threading.get_ident() else None

    def _modules_to_hook(self) -> list[tuple[nn.Module, list[Slot]]]:
        """The modules that hold slots, directly or in a submodule, with those held directly."""
        own: dict[nn.Module, list[Slot]] = {}
        for slot in self.slots:
            for module in slot.modules:
                own.setdefault(module, []).append(slot)
        return [(m, own.get(m, [])) for m in self.model.modules() if any(sub in own for sub in m.modules())]


def _nothing(known: dict[object, Tensor], slot: Slot, tensor: Tensor) -> Tensor:
    """NaN in the shape of a slot's tensor; ``known`` keeps those of a model, which has few shapes."""
    what = tensor.shape, tensor.dtype, tensor.device, slot.scaling is not None
    found = known.get(what)
    if found is None:
        found = known[what] = nan_like(tensor, dense=slot.scaling is not None)
    return found


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile or TorchScript runs this module, where hooks cannot reach it."""
    if getattr(module, "_compiled_call_impl", None) is not None:
        return True
    return isinstance(module, (torch._dynamo.OptimizedModule, torch.jit.ScriptModule))
