"""The oracle for models that fit the device: one probe after another."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LossError
from ..forward_state import Carried, ForwardState
from ..modes import probe_modes, rng_state, set_rng_state
from ..noise import Direction
from ..noise.direction import float64
from ..records import Point
from ..targets import Slot
from .function_mode import HALF
from .materialise import Materialised
from .reuse import Reuse
from .slopes import Tangent, TangentView, differentiating, judged, warm_up
from .view import Originals
from .waiting import Waiting, is_waiting, outcomes

logger = logging.getLogger(__name__)

Closure = Callable[[], Any]

ASTRAY = (
    "a layer of the model has used weights of another one for the first time; from now on probes look at every torch "
    "function in it, which costs a GPU some time"
)


def finite(losses: Sequence[Tensor]) -> bool:
    """Whether all losses are finite; waits for their device."""
    return not losses or bool(torch.stack(list(losses)).isfinite().all())


class ResidentOracle:
    """Measures losses at perturbed weights, and leaves weights, modes and hooks as they were.

    Args:
        model: the module that the closures call.
        slots: what is perturbed.
        direction: the perturbation of one slot at one point.
        dropout: run the probes with the model's own modes, dropout included, instead of eval mode.
        realisation: how the model is made to compute with the perturbed weights.
        carried: state outside of the model that closures may change.
        keep_mode: the module whose ``training`` flag probes leave alone; None for none.
        repeated: the repeated layers of the model.
        maximize: whether closures return a score, whose negative is the loss.
        reuse: compute layers that do not move once for several probes.
        unit: the direction of one slot by seed, in units of the step's eps; only points on tangents need it.

    Attributes:
        state: what forwards may change besides the weights.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: list[Slot],
        direction: Callable[[Slot, Point], Direction],
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
        self.model = model
        self.dropout = dropout
        self.keep_mode = keep_mode
        self.maximize = maximize
        self.unit = unit
        self.state = ForwardState(model, [id(tensor) for slot in slots for tensor in slot.tensors], carried)
        self.realisation = realisation(model, slots, direction, repeated)
        self.realisation.around = self.state.around_hooks
        self.reuse = Reuse(self.realisation, repeated, self.state) if reuse else None
        self._checked = self.realisation.whole
        self._warned_half = self._followed = False

    def copy_whole(self) -> None:
        """Makes each probe copy all slots at once from now on, for closures that run compiled code."""
        self.realisation.whole = self._checked = True

    def losses(self, points: Sequence[Point], closure: Closure) -> list[Tensor]:
        """The loss at each point.

        Every probe starts from the same state of the global random generators and of the model (such as
        its buffers), and afterwards both are as one forward leaves them. An exception from the closure
        is passed on; weights, modes and hooks are restored first.

        Args:
            points: where to measure.
            closure: returns the loss, one number; called once per point, so it has to use the same
                batch each time.

        Returns:
            Detached float64 tensors of shape ``[]``, on the device of the losses.

        Raises:
            LossError: the closure returned something that is not one number.
        """
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(probe_modes(self.model, dropout=self.dropout, keep=self.keep_mode))
            start = rng_state()
            self.state.begin()
            results = self._measured(points, closure, start)
            if self.realisation.unobserved and not finite(results):
                self._rewind(start)
                results = self._again(results, points, closure, start)
            return results

    def _measured(self, points: Sequence[Point], closure: Closure, start: dict[str, Any]) -> list[Tensor]:
        results: list[Tensor | Waiting] = []
        tangents: dict[int, Tangent] = {}
        # Before the first finite loss it is not known whether the model computes with the weights of its probe.
        sharing = nullcontext() if self.reuse is None else self.reuse.among(points if self._checked else ())
        with self.realisation.measuring() as originals, sharing:
            try:
                for index, point in enumerate(points):
                    known = tangents.get(point.seed) if point.linear else None
                    if results and known is None:
                        self._rewind(start)
                    if point.linear and known is None:
                        known = tangents[point.seed] = self._tangent(point, closure, start, originals)
                    measure = partial(self._loss, point, closure, start, originals)
                    if self.reuse is not None:
                        measure = partial(self.reuse.measured, index, measure, partial(self._rewind, start))
                    results.append(measure() if known is None else known.at(point.scale))
                return self._complete(results)
            finally:
                for result in results:
                    if isinstance(result, Waiting):
                        result.close()

    def _complete(self, results: list[Tensor | Waiting]) -> list[Tensor]:
        """The losses, once closures that wait have ended."""
        waiting = [result for result in results if isinstance(result, Waiting)]
        if not waiting:
            return results  # type: ignore[return-value]
        values = iter(outcomes(waiting))
        set_rng_state(waiting[-1].random)
        return [self._scalar(next(values)) if isinstance(result, Waiting) else result for result in results]

    def _again(
        self, found: list[Tensor], points: Sequence[Point], closure: Closure, start: dict[str, Any]
    ) -> list[Tensor]:
        """Measures losses that are not finite once more, with care, in case that a layer uses weights of another."""
        self.realisation.be_careful(True)
        results = self._measured(points, closure, start)
        if finite(results):
            logger.warning(ASTRAY)
        else:
            self.realisation.be_careful(False)
        return results

    def _rewind(self, start: dict[str, Any]) -> None:
        set_rng_state(start)
        self.state.rewind()

    def together(self, points: Sequence[Point], closures: Sequence[Closure]) -> list[list[Tensor]]:
        """The losses of several closures, the micro-batches of one step, at the same points."""
        return [self.losses(points, closure) for closure in closures]

    def _loss(self, point: Point, closure: Closure, start: dict[str, Any], originals: Originals) -> Tensor | Waiting:
        value = self._run(point, closure, originals)
        if isinstance(value, Waiting) or self._checked or not self.realisation.moves(point):
            return value
        if math.isfinite(value.item()):
            self._checked = True
            return value
        # NaN may be the model's own, or come from a weight used where no hook or torch function
        # shows it. Copies of all weights at once tell the two apart.
        self._rewind(start)
        self.realisation.whole = True
        whole = self._run(point, closure, originals)
        assert isinstance(whole, Tensor), "probes wait at the same time only once they are checked"
        if math.isfinite(whole.item()):
            self._checked = True
            logger.warning(
                "this model uses weights where they cannot be observed (TorchScript or C++ code), so each probe "
                "copies all of them at once; training needs memory for a second set of the trained weights"
            )
        else:
            self.realisation.whole = False
        return whole

    def _tangent(self, point: Point, closure: Closure, start: dict[str, Any], originals: Originals) -> Tangent:
        """The loss at the weights and its slope along the direction of a point, in one forward."""
        assert self.unit is not None, "points on tangents need the directions"
        if not self._followed:
            warm_up()
        self.realisation.unhook()
        view = TangentView(self.realisation, point.seed, lambda slot: originals[slot][0], self.unit)
        with differentiating():
            found = view.run(closure).scalars(partial(as_loss, maximize=self.maximize))
        self.realisation.used |= view.used

        def value(scale: float) -> float:
            self._rewind(start)
            loss = self._loss(Point(point.seed, scale), closure, start, originals)
            assert isinstance(loss, Tensor), "a closure that waits has no derivative"
            return loss.item()

        self._followed = self._followed or judged(found, value, abs(point.scale), self.realisation.slots)
        return found

    def _run(self, point: Point, closure: Closure, originals: Originals) -> Tensor | Waiting:
        perturbed = partial(self.realisation.at, point, originals)
        with perturbed():
            value = closure()
        if is_waiting(value):
            waiting = Waiting(value, perturbed, self.model, self.state)
            if self._checked:
                return waiting
            value = outcomes([waiting])[0]
        return self._scalar(value)

    def _scalar(self, value: Any) -> Tensor:
        if isinstance(value, Tensor) and value.dtype in HALF and not self._warned_half:
            self._warned_half = True
            logger.warning(
                "the loss is %s although the inputs of torch's loss functions are upcast; differences of such losses "
                "are mostly rounding, so compute it in float32 (for example logits.float() before a custom loss)",
                value.dtype,
            )
        return as_loss(value, maximize=self.maximize)


def as_scalar(value: Any) -> Tensor:
    """What a closure returned, as a detached float64 tensor of shape ``[]``, on its device if that has float64.

    Raises:
        LossError: ``value`` is not one real number.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            raise LossError(
                f"the closure returned a tensor of shape {list(value.shape)} and dtype {value.dtype}; "
                "return one real number, for example loss.mean()"
            )
        return float64(value.detach()).reshape(()).clone()  # the closure may return the same tensor again
    if value is None:
        raise LossError("the closure returned None; end it with `return loss`")
    try:
        return torch.tensor(float(value), dtype=torch.float64)
    except (TypeError, ValueError):
        raise LossError(
            f"the closure returned a {type(value).__name__}; return the loss itself, a scalar tensor or a number"
            + _hint(value)
        ) from None


def as_loss(value: Any, *, maximize: bool) -> Tensor:
    """As `as_scalar`, of minus the value if it is a score."""
    scalar = as_scalar(value)
    return 0.0 - scalar if maximize else scalar  # no negative zero


def _hint(value: object) -> str:
    if hasattr(value, "loss"):
        return " (for a model output, `return output.loss`)"
    if isinstance(value, dict) and "loss" in value:
        return ' (for a dict, `return output["loss"]`)'
    return ""
