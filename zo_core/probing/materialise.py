"""Realising a probe with scratch copies: ``theta + scale * z`` exists one layer at a time.

Nothing is ever perturbed in place, so nothing has to be undone: a weight's own memory is not
written during a probe. During a module's forward its parameters point at perturbed copies;
otherwise they point at NaN. If other code uses a parameter in between, the call of the torch
function is intercepted and the parameter gets its copy there; a use that Python cannot see gives a
NaN loss, never a silently wrong one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..noise import Direction
from ..noise.changes import together
from ..records import Point
from ..targets import Slot
from .function_mode import ProbeMode
from .scratch import ScratchPool, nan_like


class Materialised:
    """Runs code with the slots of a model perturbed.

    Args:
        model: the module that the closures call.
        slots: what is perturbed.
        direction: called with a slot and a point, returns the `Direction` from the slot's weights in memory
            to the weights at that point: ``scale * z``, and pending updates.

    Attributes:
        whole: copy everything at the start of the probe instead of layer by layer; needs memory for
            a second set of the slots, and works for modules whose code Python cannot see.
        used: whether any probe so far has used a slot.
    """

    def __init__(self, model: nn.Module, slots: list[Slot], direction: Callable[[Slot, Point], Direction]):
        self.model = model
        self.slots = slots
        self.direction = direction
        self.whole = any(is_compiled(module) for module in model.modules())
        self.used = False
        self.pool = ScratchPool()

    @contextmanager
    def at(self, point: Point) -> Iterator[None]:
        """A context in which the model computes with ``theta + point.scale * z(point.seed)``."""
        originals: Originals = {}
        with ExitStack() as stack:
            stack.callback(restore, originals)
            perturbed = self.slots if self.moves(point) else []
            view = self.view(point, lambda slot: originals[slot][0])
            for slot in perturbed:
                originals[slot] = [tensor.data for tensor in slot.tensors]
                view.release(slot)
            if self.whole:
                with together():
                    for slot in perturbed:
                        view.materialise(slot)
            elif perturbed:
                self.hook(lambda: view, stack)
            stack.enter_context(view.mode())
            yield
            self.used |= view.used

    def moves(self, point: Point) -> bool:
        """Whether the weights at a point differ from those in memory."""
        return point.scale != 0.0

    def view(self, point: Point, original: Callable[[Slot], Tensor]) -> ProbeView:
        """What the probe at a point sees; ``original`` returns the values of a slot in memory."""
        return ProbeView(self, point, original)

    def hook(self, current: Callable[[], ProbeView], stack: ExitStack) -> None:
        """Notifies the running probe of the beginning and end of every module's forward, until ``stack`` ends."""
        for module, own in self.hooked_modules():
            pre = module.register_forward_pre_hook(lambda *_, own=own: current().enter(own), prepend=True)
            post = module.register_forward_hook(lambda *_: current().leave(), always_call=True)
            stack.callback(pre.remove)
            stack.callback(post.remove)

    def hooked_modules(self) -> list[tuple[nn.Module, list[Slot]]]:
        """The modules that hold slots, directly or in a submodule, with those held directly."""
        own: dict[nn.Module, list[Slot]] = {}
        for slot in self.slots:
            for module in slot.modules:
                own.setdefault(module, []).append(slot)
        return [(m, own.get(m, [])) for m in self.model.modules() if any(sub in own for sub in m.modules())]


class ProbeView:
    """What one probe sees of the slots: which have values, and at the end of which module they lose them.

    Args:
        owner: has the directions and the scratch memory.
        point: where this probe measures.
        original: the unperturbed values of a slot.
    """

    def __init__(self, owner: Materialised, point: Point, original: Callable[[Slot], Tensor]):
        self.owner, self.point, self.original = owner, point, original
        self.given = False
        self.absent: dict[int, Slot] = {}
        self.present: dict[Slot, Tensor] = {}
        self.frames: list[list[Slot]] = [[]]

    @property
    def used(self) -> bool:
        """Whether the probe has used any slot so far."""
        return self.given

    def mode(self) -> TorchFunctionMode:
        """The mode that has to be active while the probe runs."""
        return ProbeMode(self.absent, self.serve)

    def enter(self, own: list[Slot]) -> None:
        """Called when a module's forward begins: gives the slots that it holds their values."""
        self.frames.append([])
        for slot in own:
            if id(slot.tensor) in self.absent:
                self.materialise(slot)
                # Tied weights are used again: one copy serves the whole probe.
                self.frames[0 if len(slot.modules) > 1 else -1].append(slot)

    def leave(self) -> None:
        """Called when a module's forward ends: releases the slots that got values for it."""
        for slot in self.frames.pop():
            self.release(slot)

    def serve(self, identity: int) -> None:
        """Gives a slot its copy outside its module's forward, until the enclosing module ends."""
        slot = self.absent[identity]
        self.materialise(slot)
        self.frames[-1].append(slot)

    def materialise(self, slot: Slot) -> None:
        """Points the slot at a perturbed copy, or at its own memory if this probe does not move it."""
        self.given = True
        with torch.DisableTorchFunction():
            original = self.original(slot)
            scratch = original
            if self.owner.moves(self.point) and not (direction := self.owner.direction(slot, self.point)).still:
                scratch = slot.room(original, self.owner.pool.take)
                direction.add_to(original, out=scratch)
            self.present[slot] = scratch
            for tensor, shown in zip(slot.tensors, slot.seen(scratch), strict=True):
                self.absent.pop(id(tensor))
                tensor.data = shown
        # Autocast caches casts by parameter object, and the object has just changed its values.
        torch.clear_autocast_cache()

    def release(self, slot: Slot) -> None:
        """Points the slot at NaN."""
        self.present.pop(slot, None)
        with torch.DisableTorchFunction():
            for tensor in slot.tensors:
                tensor.data = nan_like(tensor, dense=slot.scaling is not None)
                self.absent[id(tensor)] = slot
        torch.clear_autocast_cache()

    def suspend(self) -> None:
        """Called when this probe gives up the turn: points its parameters at NaN."""
        with torch.DisableTorchFunction():
            for slot in self.present:
                for tensor in slot.tensors:
                    tensor.data = nan_like(tensor, dense=slot.scaling is not None)
        torch.clear_autocast_cache()

    def resume(self) -> None:
        """Called when this probe gets the turn again: points its parameters at its copies."""
        with torch.DisableTorchFunction():
            for slot, scratch in self.present.items():
                for tensor, shown in zip(slot.tensors, slot.seen(scratch), strict=True):
                    tensor.data = shown
        torch.clear_autocast_cache()


Originals = dict[Slot, list[Tensor]]


def restore(originals: Originals) -> None:
    """Points the slots at their own memory again."""
    for slot, data in originals.items():
        for tensor, original in zip(slot.tensors, data, strict=True):
            tensor.data = original
    torch.clear_autocast_cache()


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile or TorchScript runs this module, where hooks cannot reach it."""
    if getattr(module, "_compiled_call_impl", None) is not None:
        return True
    return isinstance(module, (torch._dynamo.OptimizedModule, torch.jit.ScriptModule))
