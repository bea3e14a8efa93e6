"""Computes the layers before the first one that moves once for several probes (feature reuse, arXiv 2310.02025).

Probes of a step differ in the weights that their directions move. A repeated layer that a direction does not move
computes the same in each of its probes, given the same arguments. So the first of them records what such layers
return, and later ones get that, as long as what a layer is called with is the same to the bit: usually until the first
layer that moves.

No record is made of a call that visibly does more than return new tensors. What cannot be seen, such as a global
variable, is only found by checks: probes are measured both ways where layers are skipped for the first time, the
second, the fourth, the eighth, and so on.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..forward_state import ForwardState
from ..modes import rng_state, same_rng, set_rng_state
from ..records import Point
from ..stand_ins import same_bits
from ..targets import Slot, group_of
from .materialise import Materialised, is_compiled
from .recorded import Record, Unfit
from .stacked import transformed
from .view import ProbeView

logger = logging.getLogger(__name__)

#: After this many measurements in which no layer was skipped, a warning says so.
PATIENCE = 64

CHANGES = "a forward changes buffers or attributes of the model, or what is carried beside it"

#: The layers that are watched, by ``id``.
RUNS: dict[int, tuple[nn.Module, Run]] = {}

#: The classes of these layers: for how many runs their calls are watched, and their own ``forward`` if they have one.
WATCHED: dict[Any, tuple[int, Any]] = {}
_lock = threading.Lock()

_again: ContextVar[bool] = ContextVar("zo_again", default=False)


def measured_again() -> bool:
    """Whether the closure runs for a probe once more, and the loss of this run counts instead of the previous one's."""
    return _again.get()


class Reuse:
    """Decides which layers are computed once, and checks that it makes no difference.

    Args:
        realisation: knows the directions of the slots.
        layers: the repeated layers of the model, in the order of its modules.
        state: what forwards may change.

    Attributes:
        off: why nothing is reused any more; empty if it is.
        run: the probes that are being measured; None between steps, and where the first layer moves in all of them.

    Raises:
        ConfigError: the model has no repeated layers, or several processes compute its forward together.
    """

    def __init__(self, realisation: Materialised, layers: Sequence[nn.Module], state: ForwardState):
        if not layers:
            raise ConfigError(["reuse=True needs repeated layers, and the model has none; name some with blocks=[...]"])
        if group_of(realisation.model):
            raise ConfigError(["reuse=True takes a model that one process holds as a whole; leave it out"])
        self.realisation, self.state = realisation, state
        self.slots = {layer: _slots_in(layer, realisation.slots) for layer in layers}
        self.off = ""
        self.run: Run | None = None
        self._told: set[str] = set()
        self._times: Counter[frozenset[nn.Module]] = Counter()
        self._in_vain = 0

    def rests(self, layer: nn.Module, point: Point) -> bool:
        """Whether a layer has the weights of the step's other points at which it rests, and can be watched."""
        if any(self.moves(slot, point) for slot in self.slots[layer]):
            return False
        why = ""
        if is_compiled(layer):
            why = "a layer is compiled"
        elif "forward" in vars(layer) or not inspect.isfunction(type(layer).forward):
            why = "a layer has a forward that is not a method of its class; another library may have put it there"
        if why:
            self.tell(why)
        return not why

    def moves(self, slot: Slot, point: Point) -> bool:
        """Whether a slot may have other weights at a point than where it rests."""
        direction = self.realisation.direction(slot, point)
        # A direction that moves no weight of the slot adds zeros to it, and only where it is added at all.
        return not direction.misses(slot.shape.numel()) or bool(direction.terms and point.scale == 0.0)

    def count(self, point: Point) -> int:
        """How many layers come before the first one that moves at a point."""
        if not self.realisation.moves(point):  # then nothing shows which weights a layer uses
            return 0
        return next((index for index, layer in enumerate(self.slots) if not self.rests(layer, point)), len(self.slots))

    @contextmanager
    def among(self, points: Sequence[Point], closures: int = 1) -> Iterator[None]:
        """A context in which probes compute common layers once: one for each closure and point."""
        usable = len(points) > 1 and not (self.off or self.realisation.whole)
        counts = [self.count(point) for point in points] if usable else []
        if sum(map(bool, counts)) < 2:
            self._see(useful=False)
            yield
            return
        self.run = run = Run(self, [Probe(count, group) for group in range(closures) for count in counts])
        try:
            with _watching(list(self.slots)[: max(counts)], run):
                yield
        finally:
            self.run = None
            self._see(useful=bool(run.skipped))

    def measured(self, index: int, measure: Callable[[], Any], rewind: Callable[[], None]) -> Any:
        """The loss of the next probe.

        Args:
            index: number of its point.
            measure: runs it.
            rewind: puts back the state that probes start from.
        """
        run = self.run
        if run is None or run.ended:
            return measure()
        probe, value = run.probes[index], None
        run.turn(index)
        try:
            value = measure()
        except Exception:
            if not probe.skipped:
                raise
        finally:
            run.probe = None
        if not isinstance(value, Tensor):
            run.ended = True  # a closure that waits, or an error
        elif probe.recorded and self.state.moved:
            run.ended = True
            self.tell(CHANGES)
        if not self.due(probe.skipped) and value is not None:
            return value
        after = rng_state()
        rewind()
        token = _again.set(value is not None)
        try:
            again = measure()
        finally:
            _again.reset(token)
        self.judge([value], [again], same_random=same_rng(after, rng_state()))
        return again

    def due(self, skipped: set[nn.Module]) -> bool:
        """Whether to check now that it makes no difference to skip these layers: at the 1st, 2nd, 4th, 8th time, ..."""
        times = self._times[frozenset(skipped)] = self._times[frozenset(skipped)] + 1
        return bool(skipped) and times & (times - 1) == 0

    def judge(self, found: Sequence[Any], again: Sequence[Any], *, same_random: bool) -> None:
        """Reuses nothing any more if it has made a difference.

        Args:
            found: losses with layers skipped; None for an error.
            again: the losses when each probe computes all layers.
            same_random: whether both left the same states of the random generators.
        """
        pairs = list(zip(found, again, strict=True))
        if not same_random or not all(isinstance(one, Tensor) and same_bits(one, other) for one, other in pairs):
            self.stop("a probe that got results of layers from another one has another loss, or other random numbers")

    def stop(self, why: str) -> None:
        """Reuses nothing any more, and says so."""
        self.off = why
        if self.run is not None:
            self.run.ended = True
        logger.warning("reuse=True has no effect any more, every probe computes all layers: %s", self.off)

    def tell(self, why: str) -> None:
        """Says once why a layer that rests is computed for each probe."""
        if why not in self._told:
            self._told.add(why)
            logger.warning("reuse=True: layers that do not move are computed for each probe, because %s", why)

    def _see(self, *, useful: bool) -> None:
        self._in_vain = -1 if useful or self._in_vain < 0 else self._in_vain + 1
        if self._in_vain == PATIENCE and not self._told and not self.off:
            self.tell(
                "the first layer, or something before the layers, has moved in every step so far, or weights that move "
                "are in use while the layers run"
            )


@dataclass
class Probe:
    """One probe.

    Attributes:
        resting: how many layers come before the first one that it moves.
        group: probes of one group call the layers with the same arguments.
        calls: number of calls of each layer so far.
        skipped: layers of which it has used a record.
        recorded: whether it has made a record.
        within: whether the forward of a layer is running; what it calls is a part of it.
    """

    resting: int
    group: int
    calls: Counter[nn.Module] = field(default_factory=Counter)
    skipped: set[nn.Module] = field(default_factory=set)
    recorded: bool = False
    within: bool = False


class Run:
    """The probes of a measurement.

    Attributes:
        records: by group, layer and number of the call.
        ended: whether the remaining probes compute everything.
        probe: the one that has the turn.
    """

    def __init__(self, reuse: Reuse, probes: Sequence[Probe]):
        self.reuse, self.probes = reuse, probes
        self.places = {layer: place for place, layer in enumerate(reuse.slots)}
        self.records: dict[tuple[int, nn.Module, int], Record] = {}
        #: How many probes of a group have come to a call, and in how many the layer rests: the last needs no record.
        self.passed: Counter[tuple[int, nn.Module, int]] = Counter()
        self.resting = Counter((p.group, layer) for p in probes for layer, at in self.places.items() if at < p.resting)
        self.ended = False
        self.probe: Probe | None = None
        self._thread = 0

    @property
    def skipped(self) -> set[nn.Module]:
        """The layers of which any probe has used a record."""
        return set[nn.Module]().union(*(probe.skipped for probe in self.probes))

    def turn(self, index: int) -> None:
        """Called when a probe gets its turn, in its thread: calls of layers belong to it until the next turn."""
        self.probe, self._thread = self.probes[index], threading.get_ident()

    def call(self, layer: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Returns what ``forward`` would return."""
        probe, view = self.probe, self.reuse.realisation.running
        if probe is None or view is None or probe.within or threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        probe.within = True
        try:
            if self._usable(layer, probe, view):
                return self._call(layer, probe, view, forward, args, kwargs)
            return forward(*args, **kwargs)
        finally:
            probe.within = False

    def _usable(self, layer: nn.Module, probe: Probe, view: ProbeView) -> bool:
        """Whether a layer rests, and the call may take its result from another probe."""
        if self.ended or self.places[layer] >= probe.resting:
            return False
        if torch.is_grad_enabled() or transformed():
            self.reuse.tell("the closure enables gradients, or transforms the model with torch.func")
            return False
        own = self.reuse.slots[layer]
        # What has its values already is not seen when the layer uses it.
        return not any(slot not in own and self.reuse.moves(slot, view.point) for slot in view.present)

    def _call(
        self, layer: nn.Module, probe: Probe, view: ProbeView, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        key = probe.group, layer, probe.calls[layer]
        probe.calls[layer] += 1
        self.passed[key] += 1
        last = self.passed[key] == self.resting[probe.group, layer]
        new: Record | None = None
        with torch.DisableTorchFunction():
            known = self.records.pop(key, None) if last else self.records.get(key)
            try:
                new = Record(layer, (args, kwargs), self.reuse.state.moving)
            except Unfit as why:
                self.reuse.tell(str(why))
            if new is not None and known is not None and known.matches(new):
                probe.skipped.add(layer)
                set_rng_state(known.after)
                return known.again()
        view.taken = set()
        result = forward(*args, **kwargs)
        if not view.taken.issubset(self.reuse.slots[layer]):
            # Which layers use them, and when, is not certain from one call.
            self.records.clear()
            self.reuse.stop(f"a {type(layer).__name__} uses weights of another module")
        elif new is not None and not last:
            with torch.DisableTorchFunction():
                try:
                    new.complete(result)
                    self.records[key] = new
                    probe.recorded = True
                except Unfit as why:
                    self.records.pop(key, None)
                    self.reuse.tell(str(why))
        return result


def _slots_in(layer: nn.Module, slots: Sequence[Slot]) -> list[Slot]:
    """The slots that a layer holds, or sees a part of."""
    parts = set(layer.modules())
    held = {id(v) for part in parts for v in (*part.parameters(False), *part.buffers(False), *vars(part).values())}
    return [s for s in slots if not parts.isdisjoint(s.modules) or any(id(t) in held for t in s.tensors)]


@contextmanager
def _watching(layers: Sequence[nn.Module], run: Run) -> Iterator[None]:
    """A context in which calls of these layers go through a run.

    Their classes get another ``forward`` for that time. An attribute of the layers would go along with a copy, and with
    classes in their place the model's code would see these.
    """
    classes = {type(layer) for layer in layers}
    try:
        with _lock:
            for cls in classes:
                times, own = WATCHED.get(cls, (0, vars(cls).get("forward")))
                WATCHED[cls] = times + 1, own
                if not times:
                    setattr(cls, "forward", _watched(cls.forward))  # noqa: B010
            RUNS.update((id(layer), (layer, run)) for layer in layers)
        yield
    finally:
        with _lock:
            for layer in layers:
                if RUNS.get(id(layer), (None, None))[1] is run:
                    del RUNS[id(layer)]
            for cls in classes:
                times, own = WATCHED.pop(cls)
                if times > 1:
                    WATCHED[cls] = times - 1, own
                elif own is None:
                    del cls.forward  # it has that of a base class
                else:
                    setattr(cls, "forward", own)  # noqa: B010


def _watched(own: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(own)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        layer, run = RUNS.get(id(self), (None, None))
        if run is None or layer is not self:
            return own(self, *args, **kwargs)
        return run.call(self, partial(own, self), args, kwargs)

    return forward
