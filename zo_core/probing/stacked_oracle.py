"""The oracle that measures all points of a step in one forward, where the closure allows it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ..errors import QueryError
from ..modes import probe_modes, rng_state, set_rng_state
from ..noise import Alternatives
from ..records import Point
from ..targets import Slot
from .function_mode import HALF
from .resident import Closure, ResidentOracle, as_loss
from .scratch import nan_like
from .stacked import NotStackable, StackedMode, StackedSight, is_stack
from .view import Originals, point_at
from .waiting import is_waiting

logger = logging.getLogger(__name__)


class StackedOracle(ResidentOracle):
    """As `ResidentOracle`, with one call of the closure for all points.

    The first step is measured both ways. If losses differ by more than rounding, or code cannot run on
    several copies, that is logged once, and from then on probes run one after another.

    Args:
        alternatives: the perturbations of one slot at some points; the other arguments are those of `ResidentOracle`.
    """

    def __init__(self, *args: Any, alternatives: Callable[[Slot, Sequence[Point]], Alternatives], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.alternatives = alternatives
        self.stacking, self._compared = True, False

    def losses(self, points: Sequence[Point], closure: Closure) -> list[Tensor]:
        if not self.stacking or len(points) < 2:
            return super().losses(points, closure)
        if self.realisation.whole:
            self._stop("the model runs compiled code")
            return super().losses(points, closure)
        start = rng_state()
        self.state.begin()
        try:
            found = self._stacked(points, closure)
            problem = self._kept_copies()
        except QueryError:
            raise
        except Exception as error:  # the closure's own error is raised again below
            text = str(error).strip().splitlines() or [""]
            problem = text[0] if isinstance(error, NotStackable) else f"{type(error).__name__}: {text[0]}"
        if problem is None and self._compared:
            return found
        after = rng_state()
        self._rewind(start)
        separate = super().losses(points, closure)
        if problem is None:
            problem = difference(found, separate, self.realisation.slots)
        if problem is not None:
            self._stop(problem)
            return separate
        self._compared = all(math.isfinite(loss.item()) for loss in separate)
        set_rng_state(after)
        return found  # as in later steps, so that a resumed run, whose first step is another one, has the same numbers

    def _kept_copies(self) -> str | None:
        """Reports if the model has kept a value of every probe, which is unusable once the forward has ended."""
        for part in self.state.changed():
            if any(is_stack(value) for value in part.found()):
                return f"a forward keeps what it computes in {part.name}"
        return None

    def _stop(self, problem: str) -> None:
        self.stacking = False
        logger.warning("stack_probes=True has no effect, probes run one after another: %s", problem)

    def _stacked(self, points: Sequence[Point], closure: Closure) -> list[Tensor]:
        slots = self.realisation.slots
        originals: Originals = {}
        sight = StackedSight(slots, lambda slot: originals[slot][0], self.alternatives, points)

        def run(_: Tensor) -> Tensor:
            with StackedMode(sight):
                value = closure()
            if is_waiting(value):
                value.close()
            if not isinstance(value, Tensor) or value.numel() != 1 or value.is_complex():
                raise NotStackable("the closure does not return the loss as a tensor with one element")
            return as_loss(value, maximize=self.maximize)

        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(probe_modes(self.model, dropout=self.dropout, keep=self.keep_mode))
            stack.callback(point_at, originals)
            for slot in slots:
                originals[slot] = [tensor.data for tensor in slot.tensors]
                for tensor in slot.tensors:
                    tensor.data = nan_like(tensor, dense=slot.scaling is not None)
            torch.clear_autocast_cache()
            # The same random numbers for all copies, as for separate probes.
            return list(torch.vmap(run, randomness="same")(torch.arange(len(points))).unbind())


def difference(stacked: list[Tensor], separate: list[Tensor], slots: Sequence[Slot]) -> str | None:
    """Reports if losses at the same points differ by more than the rounding of sums in another order.

    The tolerance is some units in the last place of float32, in which losses are computed, or of the dtype in
    which the model computes if that has fewer digits.
    """
    types = {slot.tensor.dtype for slot in slots}
    if torch.is_autocast_enabled(slots[0].tensor.device.type):
        types.add(torch.get_autocast_dtype(slots[0].tensor.device.type))
    halves = [torch.finfo(dtype).eps for dtype in types if dtype in HALF]
    tolerance = max([64 * torch.finfo(torch.float32).eps, *(8 * eps for eps in halves)])
    for one, other in zip(stacked, separate, strict=True):
        a, b = one.item(), other.item()
        if math.isfinite(b) and not abs(a - b) <= tolerance * max(1.0, abs(b)):
            return f"a loss of the first step is {a:.7g} in one forward, and {b:.7g} by itself"
    return None
