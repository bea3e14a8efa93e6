"""The oracle for models larger than the device: all probes of a step in one sweep over the blocks.

Every probe's whole closure runs as a coroutine. At the end of each block's forward it hands over to
the next, so a block is fetched once and every probe passes through it before it leaves.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..cache import trim_heaps
from ..errors import ConfigError
from ..forward_state import Carried, ForwardState
from ..modes import modes, probe_modes, rng_state, same_rng, set_modes, set_rng_state
from ..noise import Direction
from ..probing.materialise import Materialised
from ..probing.resident import ASTRAY, Closure, as_loss, finite
from ..probing.reuse import CHANGES, Reuse
from ..probing.slopes import Tangent, TangentView, differentiating, judged, warm_up
from ..probing.view import Originals, ProbeView
from ..probing.waiting import is_waiting, outcomes
from ..records import Point
from ..targets import Slot
from .lockstep import Lockstep
from .own_state import OwnState
from .streaming import Block, Streaming
from .tensor_file import Tensors

logger = logging.getLogger(__name__)

#: With blocks of at least this size, a probe that hands over returns what its thread's heap has kept, because the
#: next probe has a heap of its own. That takes about a millisecond, and such a block much longer.
TRIM_BYTES = 8 << 20


class LockstepOracle:
    """Measures losses of a streamed model; the results are those of `ResidentOracle`, bit for bit.

    Args:
        model: the module that the closures call.
        slots: what is perturbed.
        direction: the perturbation of one slot at one point.
        streaming: the blocks.
        dropout: run the probes with the model's own modes.
        realisation: how the model is made to compute with the perturbed weights.
        carried: state outside of the model that closures may change.
        keep_mode: the module whose ``training`` flag probes leave alone; None for none.
        repeated: the repeated layers of the model, resident ones included.
        maximize: whether closures return a score, whose negative is the loss.
        reuse: compute layers that do not move once for several probes.
        unit: the direction of one slot by seed, in units of the step's eps; only points on tangents need it.

    Attributes:
        quiet: whether no sweep so far has changed random states or the model; None before the first.
        state: what forwards may change besides the weights.
        tangent: what the last sweep with points on tangents has found along the first direction.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: list[Slot],
        direction: Callable[[Slot, Point], Direction],
        streaming: Streaming,
        *,
        unit: Callable[[Slot, int], Direction] | None = None,
        dropout: bool,
        realisation: type[Materialised] = Materialised,
        carried: Sequence[Carried] = (),
        keep_mode: nn.Module | None = None,
        repeated: Sequence[nn.Module] = (),
        maximize: bool = False,
        reuse: bool = False,
    ):
        self.model, self.streaming, self.dropout = model, streaming, dropout
        blocks = {block.module for block in streaming.blocks}
        # Probes take turns at the end of a block, and a layer is copied at once for one probe.
        closed = [m for m in repeated if m in blocks or blocks.isdisjoint(m.modules())]
        self.realisation = realisation(model, slots, direction, closed)
        self.realisation.stays = self._stays
        self.lockstep = Lockstep(self._leave, self._enter)
        self.home = {slot: where for slot in slots if (where := streaming.home(slot.tensors)) is not None}
        self.resident = [slot for slot in slots if slot not in self.home]
        trained = set(self.home.values())
        self.frozen = {b: [name for name in b.holders if (b, name) not in trained] for b in streaming.blocks}
        self._checked = self._followed = False
        self.unit = unit
        self.tangent: Tangent | None = None
        self.quiet: bool | None = None
        self.keep_mode = keep_mode
        self.maximize = maximize
        held = [tensor for block in streaming.blocks for tensors in block.holders.values() for tensor in tensors]
        moving = [id(tensor) for tensor in (*held, *(tensor for slot in slots for tensor in slot.tensors))]
        self.state = ForwardState(model, moving, carried)
        self.trims = streaming.device.type == "cpu" and max(b.nbytes for b in streaming.blocks) >= TRIM_BYTES
        self.views: list[ProbeView] = []
        self.own = OwnState(model, self.state)
        self.reuse = Reuse(self.realisation, repeated, self.state) if reuse else None
        self.originals: Originals = {}
        #: The block whose forward is running, with its values.
        self.opened: tuple[Block, Tensors] | None = None

    def losses(self, points: Sequence[Point], closure: Closure) -> list[Tensor]:
        """As `ResidentOracle.losses`, in one sweep over the blocks."""
        return self._sweep(points, [closure])

    def together(self, points: Sequence[Point], closures: Sequence[Closure]) -> list[list[Tensor]]:
        """As `ResidentOracle.together`, in one sweep, unless a closure changes state that the next one uses.

        Examples are drawing random numbers or changing a buffer; then each closure has its own sweep from now on.
        """
        if self.quiet is not False and len(closures) > 1:
            back = self._start(rng_state())
            found = self._sweep(points, closures)
            if self.quiet:
                return [found[at : at + len(points)] for at in range(0, len(found), len(points))]
            back()
        return [self.losses(points, closure) for closure in closures]

    def _sweep(self, points: Sequence[Point], closures: Sequence[Closure]) -> list[Tensor]:
        """The losses of the first closure at all points, then of the second, and so on."""
        start = rng_state()
        back = self._start(start)
        linear = [point for point in points if point.linear]
        if linear and len(linear) < len(points):  # fused attention is off in all probes of a sweep, or in none
            tangents = iter(self._sweep(linear, closures))
            back()
            others = iter(self._sweep([point for point in points if not point.linear], closures))
            return [next(tangents if point.linear else others) for _ in closures for point in points]
        losses = self._sharing_sweep(points, closures, back)
        if self.realisation.unobserved and not finite(losses):
            back()
            self.realisation.be_careful(True)
            losses = self._sharing_sweep(points, closures, back)
            if finite(losses):
                logger.warning(ASTRAY)
            else:
                self.realisation.be_careful(False)
        self.own.looking &= len(probes_of(points)) * len(closures) == 1  # one probe alone shows nothing about turns
        drew = self.own.drew and not same_rng(start, rng_state())
        silent = not drew and not self.state.shared and not self.state.beside_changed
        self.quiet = silent and self.quiet is not False
        if linear and not self._followed:
            self._followed = self._judged(points[0], closures[0], back)
        return losses

    def _judged(self, point: Point, closure: Closure, back: Callable[[], None]) -> bool:
        """Compares the first slope of the run with losses, as the resident oracle does."""

        def value(scale: float) -> float:
            back()
            return self._settled_sweep([Point(point.seed, scale)], [closure], back)[0].item()

        assert self.tangent is not None, "the last sweep has found it"
        return judged(self.tangent, value, abs(point.scale), self.realisation.slots)

    def _sharing_sweep(
        self, points: Sequence[Point], closures: Sequence[Closure], back: Callable[[], None]
    ) -> list[Tensor]:
        """A settled sweep in which probes share layers; a second one now and then, to check that it is the same."""
        reuse, changes = self.reuse, self.state.shared or self.state.beside_changed
        if reuse is not None and changes:
            reuse.tell(CHANGES)
        # A forward that changes the model, or what is beside it, must happen as a whole in every probe.
        if reuse is None or not self._checked or changes:
            return self._settled_sweep(points, closures, back)
        found: list[Tensor] | None = None
        with reuse.among(points, len(closures)):
            run = reuse.run
            try:
                found = self._settled_sweep(points, closures, back)
            except Exception:
                if run is None or not run.skipped:
                    raise
        changes = self.state.shared or self.state.beside_changed
        if run is None or (found is not None and not changes and not reuse.due(run.skipped)):
            assert found is not None, "an error was raised"
            return found
        after = rng_state()
        back()
        losses = self._settled_sweep(points, closures, back)
        if not changes:
            judged = [None] * len(losses) if found is None else found
            reuse.judge(judged, losses, same_random=same_rng(after, rng_state()))
        return losses

    def _settled_sweep(
        self, points: Sequence[Point], closures: Sequence[Closure], back: Callable[[], None]
    ) -> list[Tensor]:
        """A sweep whose probes have not seen each other's state."""
        self.own.seen = False
        while True:
            try:
                losses = self._one_sweep(points, closures)
            except Exception:
                if not self.own.seen:  # otherwise state of another probe may have caused it
                    raise
            else:
                self.own.seen |= self.state.share()
            if not self.own.seen:
                return losses
            self.own.seen = False
            back()

    def _start(self, generators: dict[str, Any]) -> Callable[[], None]:
        """Records the state of the process, besides that of the generators; returns what puts it back after a sweep."""
        modules = list(self.model.modules())
        flags, forwards = modes(modules), self.state.get()

        def back() -> None:
            set_rng_state(generators)
            set_modes(modules, flags)
            self.state.put(forwards)
            self.state.rewind()

        return back

    def _one_sweep(self, points: Sequence[Point], closures: Sequence[Closure]) -> list[Tensor]:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(probe_modes(self.model, dropout=self.dropout, keep=self.keep_mode))
            stack.callback(self._end)
            probes, tangents = probes_of(points), bool(points) and points[0].linear
            if tangents:
                if not self._followed:
                    warm_up()
                stack.enter_context(differentiating())
            self._begin([point for _ in closures for point in probes], stack)
            wanted = [closure for closure in closures for _ in probes]
            losses = self.lockstep.run([self._coroutine(*pair) for pair in zip(self.views, wanted, strict=True)])
            for view in self.views:
                self.realisation.learn(view)
            if tangents:
                self.tangent, turns = losses[0], {probe.seed: index for index, probe in enumerate(probes)}
                starts = range(0, len(losses), len(probes))
                losses = [losses[at + turns[point.seed]].at(point.scale) for at in starts for point in points]
        if not self._checked:
            self._checked = True
            if all(bool(loss.isnan()) for loss in losses):
                logger.warning(
                    "every loss of the first sweep is NaN; if that is not the model's own doing, it uses streamed "
                    "weights where they cannot be observed (C++ code): keep those layers resident by naming the "
                    "others in blocks=[...]"
                )
        return losses

    def copy_whole(self) -> None:
        """Raises `ConfigError`: the model of a closure that runs compiled code cannot be streamed."""
        raise ConfigError(["a compiled model cannot be streamed, its blocks are out of reach; leave out torch_compile"])

    def _begin(self, points: Sequence[Point], stack: ExitStack) -> None:
        self.state.begin()
        stack.enter_context(self.streaming.sweep())
        self.own.begin(len(points))
        self.originals = stack.enter_context(self.realisation.measuring(self.resident))
        self.views = [self._view(point) for point in points]
        self.realisation.hook()
        for block in self.streaming.blocks:
            # Registered after the hooks above: prepended, so first before the forward, and last after it.
            for handle in (
                block.module.register_forward_pre_hook(lambda *_, b=block: self._open(b), prepend=True),
                block.module.register_forward_hook(lambda *_, b=block: self._shut(b), always_call=True),
                block.module.register_forward_hook(lambda *_: self.lockstep.rendezvous()),
            ):
                stack.callback(handle.remove)
        self.state.note_own_hooks()

    def _view(self, point: Point) -> ProbeView:
        if not point.linear:
            return self.realisation.view(point, self._original)
        assert self.unit is not None, "points on tangents need the directions"
        return TangentView(self.realisation, point.seed, self._original, self.unit)

    def _coroutine(self, view: ProbeView, closure: Closure) -> Callable[[], Any]:
        def run() -> Any:
            if isinstance(view, TangentView):
                return view.run(closure).scalars(partial(as_loss, maximize=self.maximize))
            with view.mode():
                value = closure()
                return as_loss(outcomes([value])[0] if is_waiting(value) else value, maximize=self.maximize)

        return run

    def _original(self, slot: Slot) -> Tensor:
        home = self.home.get(slot)
        if home is None:
            return self.originals[slot][0]
        block, name = home
        if self.opened is not None and self.opened[0] is block:
            return self.opened[1][name]
        return self.streaming.values(block)[name]

    def _stays(self, slot: Slot) -> bool:
        """Outside of its block's forward, a streamed slot has memory that the next block takes over."""
        home = self.home.get(slot)
        # What several modules hold is given to a probe once, and kept until its end.
        return home is None or (self.opened is not None and self.opened[0] is home[0] and len(slot.modules) == 1)

    def _open(self, block: Block) -> None:
        with torch.DisableTorchFunction():
            self.streaming.open(block, only=self.frozen[block])
            self.opened = block, self.streaming.values(block)  # which stay where they are until `shut`

    def _shut(self, block: Block) -> None:
        self.opened = None
        with torch.DisableTorchFunction():
            self.streaming.shut(block, only=self.frozen[block])

    def _leave(self, index: int) -> None:
        self.own.leave(index)
        self.views[index].suspend()
        if self.trims:
            trim_heaps()

    def _enter(self, index: int) -> None:
        self.own.enter(index)
        if self.reuse is not None and self.reuse.run is not None:
            self.reuse.run.turn(index)
        self.realisation.run(self.views[index])
        self.views[index].resume()

    def _end(self) -> None:
        self.state.own_hooks = 0
        self.realisation.used |= any(view.used for view in self.views)
        self.own.end()
        self.views, self.originals, self.opened = [], {}, None


def probes_of(points: Sequence[Point]) -> list[Point]:
    """The points that take a forward each: those on one tangent share it."""
    if not points or not points[0].linear:
        return list(points)
    return list({point.seed: point for point in points}.values())
