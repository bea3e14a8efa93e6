"""What a probe sees of the perturbed weights while the model runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from ..noise import Direction
from ..noise.changes import add_all
from ..records import Point
from ..targets import Slot
from .function_mode import ProbeMode
from .layers import Layer, Look
from .scratch import ScratchPool

Originals = dict[Slot, list[Tensor]]


class Owner(Protocol):
    """What a view uses of the object that realises probes; see `Materialised`."""

    pool: ScratchPool
    absent: dict[int, Slot]
    nothing: Originals

    def moves(self, point: Point) -> bool: ...

    @property
    def direction(self) -> Callable[[Slot, Point], Direction]: ...

    @property
    def stays(self) -> Callable[[Slot], bool]: ...


class Frame:
    """The forward of a module that is running.

    Attributes:
        slots: those that lose their values at its end.
        layer: the layer whose slots lose their values together, or None.
        away: the mode that intercepts torch functions again from its end on, or None.
        looked: whether the probe looks at the layer until its end.
    """

    __slots__ = ("away", "layer", "looked", "slots")

    def __init__(self) -> None:
        self.slots: list[Slot] = []
        self.layer: Layer | None = None
        self.away: TorchFunctionMode | None = None
        self.looked = False


class ProbeView:
    """What one probe sees of the slots: which have values, and at the end of which module they lose them.

    Args:
        owner: has the directions and the scratch memory.
        point: where this probe measures.
        original: the unperturbed values of a slot.

    Attributes:
        looks: what it has seen of layers that no probe had seen before.
        outside: slots of layers that got their values outside of their layer's forward.
        taken: slots that got values since somebody has last put an empty set here.
    """

    def __init__(self, owner: Owner, point: Point, original: Callable[[Slot], Tensor]):
        self.owner, self.point, self.original = owner, point, original
        self.given = False
        self.absent = owner.absent.copy()
        self.present: dict[Slot, Tensor] = {}
        self.frames = [Frame()]
        self.looks: dict[Layer, Look] = {}
        self.outside: set[Slot] = set()
        self.taken: set[Slot] = set()
        self.look: Look | None = None

    def mode(self) -> TorchFunctionMode:
        """The mode that has to be active while the probe runs. It refers to this object, so this one must not to it."""
        return ProbeMode(self.absent, self.serve, self.upcast)

    @property
    def used(self) -> bool:
        """Whether the probe has used any slot so far."""
        return self.given

    def enter(self, own: list[Slot]) -> None:
        """Called when a module's forward begins: gives the slots that it holds their values."""
        self.frames.append(Frame())
        self._give(own)

    def _give(self, own: list[Slot]) -> None:
        for slot in own:
            if id(slot.tensor) in self.absent:
                self.materialise(slot)
                # Tied weights are used again: one copy serves the whole probe.
                self.frames[0 if len(slot.modules) > 1 else -1].slots.append(slot)
                (self.outside if self.look is None else self.look.given).add(slot)

    def begin(self, layer: Layer, own: list[Slot], careful: bool) -> None:
        """Called when a repeated layer's forward begins.

        Args:
            layer: the layer.
            own: slots to give their values one by one: those that its module holds, or `Layer.rest`.
            careful: treat it as if no probe had seen it.
        """
        frame = Frame()
        self.frames.append(frame)
        if not layer.known and self.look is None:
            self.look = self.looks.setdefault(layer, Look())
            frame.looked = True
        if layer.at_once and not careful:
            if layer.places.keys() <= self.absent.keys():
                self.materialise_layer(layer)
                frame.layer = layer
            else:  # some have values already: they were used before, or this is a forward within a forward
                self._give(layer.own)
        self._give(own)
        if layer.unobserved and not careful:
            frame.away = self._look_away()

    def _look_away(self) -> TorchFunctionMode | None:
        """Ends the interception of torch functions, unless a mode of the closure is active above that of the probe."""
        modes = _get_current_function_mode_stack()
        if not modes or not isinstance(modes[-1], ProbeMode) or modes[-1].absent is not self.absent:
            return None
        modes[-1].__exit__(None, None, None)
        return modes[-1]

    def leave(self) -> None:
        """Called when a module's forward ends: releases the slots that got values for it."""
        frame = self.frames.pop()
        if frame.away is not None:
            frame.away.__enter__()
        if frame.looked:
            self.look = None
        if frame.layer is not None:
            self.release_layer(frame.layer)
        for slot in frame.slots:
            self.release(slot)

    def serve(self, identity: int) -> None:
        """Gives a slot its copy outside its module's forward, until the enclosing module ends."""
        slot = self.absent[identity]
        self.materialise(slot)
        self.frames[-1].slots.append(slot)
        (self.outside if self.look is None else self.look.served).add(slot)

    def upcast(self) -> None:
        """Called when an input of a loss function is upcast."""
        if self.look is not None:
            self.look.upcast = True

    def materialise(self, slot: Slot) -> None:
        """Points the slot at a perturbed copy, or if this probe does not move it at its own memory, if that stays."""
        self.given = True
        self.taken.add(slot)
        with torch.DisableTorchFunction():
            original = self.original(slot)
            if self.look is not None:
                self.look.see(original)
            scratch = original
            if self.owner.moves(self.point) and not (direction := self.owner.direction(slot, self.point)).still:
                scratch = slot.room(original, self.owner.pool.take)
                direction.add_to(original, out=scratch)
            elif not self.owner.stays(slot):
                scratch = slot.room(original, self.owner.pool.take).copy_(original)
            self.present[slot] = scratch
            for tensor, shown in zip(slot.tensors, slot.seen(scratch), strict=True):
                self.absent.pop(id(tensor))
                tensor.data = shown
        # Autocast caches casts by parameter object, and the object has just changed its values.
        torch.clear_autocast_cache()

    def materialise_layer(self, layer: Layer) -> None:
        """As `materialise`, for all slots that a layer has for itself."""
        self.given = True
        self.taken.update(layer.own)
        owner, point = self.owner, self.point
        with torch.DisableTorchFunction():
            own = layer.own
            copies = values = [self.original(slot) for slot in own]
            if owner.moves(point):
                copies = owner.pool.take_all(values)
                directions = [owner.direction(slot, point) for slot in own]
                moves = [each for each in zip(directions, values, copies, strict=True) if not each[0].still]
                if moves:
                    add_all(*zip(*moves, strict=True))
                if len(moves) < len(own):
                    copies = [v if d.still else c for d, v, c in zip(directions, values, copies, strict=True)]
            for slot, shown in zip(own, copies, strict=True):
                for tensor in slot.tensors:
                    tensor.data = shown
        for identity in layer.places:
            del self.absent[identity]
        torch.clear_autocast_cache()

    def release(self, slot: Slot) -> None:
        """Points the slot at NaN."""
        self.present.pop(slot, None)
        with torch.DisableTorchFunction():
            for tensor, nothing in zip(slot.tensors, self.owner.nothing[slot], strict=True):
                tensor.data = nothing
                self.absent[id(tensor)] = slot
        torch.clear_autocast_cache()

    def release_layer(self, layer: Layer) -> None:
        """As `release`, after `materialise_layer`."""
        nothing = self.owner.nothing
        with torch.DisableTorchFunction():
            for slot in layer.own:
                for tensor, empty in zip(slot.tensors, nothing[slot], strict=True):
                    tensor.data = empty
        self.absent.update(layer.places)
        torch.clear_autocast_cache()

    def end(self) -> None:
        """Called when the probe has ended: points everything at NaN."""
        for slot in list(self.present):
            self.release(slot)

    def suspend(self) -> None:
        """Called when this probe gives up the turn: points its parameters at NaN."""
        point_at({slot: self.owner.nothing[slot] for slot in self.present})

    def resume(self) -> None:
        """Called when this probe gets the turn again: points its parameters at its copies."""
        point_at({slot: slot.seen(scratch) for slot, scratch in self.present.items()})


def point_at(values: Originals) -> None:
    """Points the tensors of each slot at other memory."""
    with torch.DisableTorchFunction():
        for slot, data in values.items():
            for tensor, shown in zip(slot.tensors, data, strict=True):
                tensor.data = shown
    torch.clear_autocast_cache()
