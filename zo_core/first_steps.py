"""Checks of the closure during the first steps, for mistakes with which a run would continue and learn nothing."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .modes import rng_state, set_rng_state
from .probing import ResidentOracle, difference
from .records import Point
from .streaming import LockstepOracle
from .targets import Slot

logger = logging.getLogger(__name__)


class FirstSteps:
    """Checks the first steps of an engine, and logs each problem once."""

    def __init__(self) -> None:
        self.looked = False
        self._without_signal: int | None = 0

    def look(
        self, oracle: ResidentOracle | LockstepOracle, points: Sequence[Point], closure: Callable[[], Any]
    ) -> tuple[Point, Tensor]:
        """Measures one point of the first step in advance; generators and buffers are restored afterwards.

        Returns:
            The point and its loss, for `compare`.
        """
        self.looked = True
        start = rng_state()
        point = next((point for point in points if point.scale), points[0])
        loss = oracle.losses((point,), closure)[0]
        set_rng_state(start)
        oracle.state.rewind()
        if not oracle.realisation.used:
            logger.warning(
                "the closure ran without any of the trained weights, so nothing will be learnt; it has to call the "
                "model that is trained (or what wraps it) each time"
            )
        return point, loss

    def compare(self, first: Tensor, again: Tensor, slots: Sequence[Slot]) -> None:
        """Warns if the closure returned two different losses at the same weights."""
        if difference([first], [again], slots) is not None:
            logger.warning(
                "the closure returned the losses %.7g and %.7g at the same weights and with the same random numbers; "
                "differences between probes are then noise. Draw the batch before the closure, so that every probe has "
                "the same one (batch = next(batches); zo.step(lambda: loss_of(batch))), and draw random numbers from "
                "torch's, numpy's or Python's global generators, which are the same for all probes",
                first.item(),
                again.item(),
            )

    def see(self, losses: Sequence[float], eps: float) -> None:
        """Warns of losses that do not depend on the weights, until a step has losses that do."""
        if self._without_signal is None or not all(map(math.isfinite, losses)):
            return
        if len(set(losses)) > 1:
            self._without_signal = None
            return
        self._without_signal += 1
        if self._without_signal == 2:
            logger.warning(
                "all losses of the first two steps agree exactly (%.7g in all probes of the last one), so nothing is "
                "learnt. Forward-only training sees only values. Either the loss has the same value whatever the "
                "weights are (a loss that defines a gradient by detach(), as in GRPO with one iteration; then train on "
                "the reward itself), or the model does not take part in it, or it moves in steps (an accuracy) that "
                "are wider than probes with eps=%g can see: take a larger eps, more rows or more directions",
                losses[0],
                eps,
            )
