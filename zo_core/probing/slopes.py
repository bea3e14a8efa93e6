"""The slope of the loss along a direction, exactly: one forward with dual numbers (forward-mode differentiation).

A dual tensor carries its derivative along the direction beside its value. Torch functions get dual tensors in the
place of parameters, one slot at a time, as `FunctionalMode` gives them copies; the parameters themselves show NaN.
"""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from ..errors import LossError, ModelError
from ..noise import Direction
from ..records import Point
from ..targets import Slot
from .functional import FunctionalMode, FunctionalView, Sight
from .layers import Layer
from .materialise import Materialised
from .waiting import is_waiting

logger = logging.getLogger(__name__)

#: How torch says that an operation has no forward derivative.
OPERATION = re.compile(r"forward AD with (\S+) that does not support it")
FUNCTION = "custom autograd.Function"

#: The types of operators as ``torch.ops`` has them, with all overloads and with one.
OPERATORS = (type(torch.ops.aten.add), type(torch.ops.aten.add.Tensor))

#: How the names of torch's own operators begin.
OURS = ("aten.", "prims.", "quantized.")

#: Relative difference up to which a slope agrees with two losses.
NEAR = 0.1

OTHERWISE = "write estimator='spsa', which needs only values of the loss"


@dataclass(frozen=True)
class Tangent:
    """The loss along a direction, to first order.

    Attributes:
        loss: what the closure returned.
        slope: its derivative along the direction.
    """

    loss: Tensor
    slope: Tensor

    def scalars(self, work: Callable[[Tensor], Tensor]) -> Tangent:
        """The same with a function of both numbers."""
        return Tangent(work(self.loss), work(self.slope))

    def at(self, scale: float) -> Tensor:
        """The value of the tangent at a distance from the weights."""
        return self.loss + scale * self.slope


class Duals(Sight):
    """The weights as dual tensors, formed where a function uses one and then dropped.

    Args:
        tangent: the direction of a slot, in units of the step's eps.
        pending: whether updates are pending, which ``direction`` then adds. The other arguments are those of `Sight`.

    Attributes:
        moved: whether a slot that the direction moves was used.
    """

    def __init__(self, *args: Any, tangent: Callable[[Slot], Direction], pending: bool):
        super().__init__(*args)
        self.tangent, self.pending, self.moved = tangent, pending, False

    def factors(self, slot: Slot, dtype: torch.dtype) -> None:
        return None

    def copy(self, slot: Slot) -> Tensor:
        self.used = True
        values = super().copy(slot) if self.pending else self.values(slot).detach()
        tangent = self.tangent(slot)
        if tangent.still:
            return values
        self.moved = True
        return forward_ad.make_dual(values, tangent.gradient(values).to(values.dtype))


class DualMode(FunctionalMode):
    """As `FunctionalMode`, and notices operators from outside of torch that drop the derivative without an error."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        if isinstance(func, OPERATORS) and not str(func).startswith(OURS):
            given = [self.replaced(value) for value in (*args, *(kwargs or {}).values())]
            if any(map(_slopes, given)) and not _slopes(result):
                raise _without(str(func))
        return result


def _slopes(value: Any) -> bool:
    """Whether a derivative is in a value, or in the entries of a tuple or list."""
    if isinstance(value, (tuple, list)):
        return any(map(_slopes, value))
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


class TangentView(FunctionalView):
    """What a forward with dual numbers sees: torch functions get dual tensors, and the parameters show NaN.

    Args:
        owner: realises the probes.
        seed: seed of the direction.
        original: the values of a slot in memory.
        unit: the direction of a slot by seed, in units of the step's eps.

    Raises:
        ModelError: the weights cannot be replaced by dual tensors.
    """

    def __init__(
        self, owner: Materialised, seed: int, original: Callable[[Slot], Tensor], unit: Callable[[Slot, int], Direction]
    ):
        _check(owner)
        here = Point(seed, 0.0)
        super().__init__(owner, here, original)
        self.sight: Duals = Duals(
            owner.slots,
            original,
            lambda slot: owner.direction(slot, here),
            owner.pool,
            tangent=lambda slot: unit(slot, seed),
            pending=owner.moves(here),
        )

    def mode(self) -> TorchFunctionMode:
        return DualMode(self.sight, losses=True)

    def enter(self, own: list[Slot]) -> None:
        """Does nothing: no parameter gets values."""

    def begin(self, layer: Layer, own: list[Slot], careful: bool) -> None:
        """Does nothing, as `enter`."""

    def leave(self) -> None:
        """Does nothing, as `enter`."""

    def run(self, closure: Callable[[], Any]) -> Tangent:
        """Runs a closure in the mode of this view, within `differentiating`.

        Raises:
            ModelError: an operation has no forward derivative; it is named.
            LossError: the loss does not carry a derivative.
        """
        try:
            with self.mode():
                value = closure()
        except NotImplementedError as error:
            problem = _problem(error)
            if problem is None:
                raise
            raise problem from error
        finally:
            torch.clear_autocast_cache()
        if is_waiting(value) or not isinstance(value, Tensor):
            if is_waiting(value):
                value.close()
            raise LossError(
                f"estimator='forward_grad' differentiates the loss, and the closure returned a {type(value).__name__}; "
                f"return the loss as a tensor, or {OTHERWISE}"
            )
        loss, slope = forward_ad.unpack_dual(value)
        if slope is None and self.sight.moved:
            raise LossError(
                "the loss carries no derivative although weights that move were used: a detach(), an item() or code "
                f"outside of torch lies between them and the loss; {OTHERWISE}"
            )
        return Tangent(loss.detach(), torch.zeros_like(loss) if slope is None else slope.detach())


def _check(owner: Materialised) -> None:
    if owner.whole:
        raise unseen()
    if any(slot.scaling is not None for slot in owner.slots):
        raise ModelError(
            "estimator='forward_grad' differentiates along ordinary weights, and here the scales of quantised weights "
            f"move; {OTHERWISE}"
        )
    if any(slot.part is not None for slot in owner.slots):
        raise ModelError(f"estimator='forward_grad' needs whole weights, and parameters are DTensors here; {OTHERWISE}")


@contextmanager
def differentiating() -> Iterator[None]:
    """A context for forwards with dual tensors. It counts for all threads, as fused attention is a global switch."""
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward derivative
        yield


def judged(found: Tangent, value: Callable[[float], float], eps: float, slots: Sequence[Slot]) -> bool:
    """Compares the first slope of a run with losses, and returns whether that could be done.

    Args:
        found: by differentiation.
        value: the loss at a distance along the same direction.
        eps: that of the step.
        slots: what moves.

    Raises:
        ModelError: the model computes with weights that have no dual tensors.
    """
    if math.isfinite(found.loss.item()):
        rounding = max(torch.finfo(slot.tensor.dtype).eps for slot in slots)
        if eps:
            compare(found, value(eps), value(-eps), eps, 8 * max(rounding, 2.0**-23))
        return True
    if math.isfinite(value(0.0)):
        raise unseen()
    return False


def warm_up() -> None:
    """Makes torch load what dual tensors need, which warns of a deprecated function of torch's own."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", FutureWarning)
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


def compare(found: Tangent, plus: float, minus: float, eps: float, rounding: float) -> None:
    """Warns if a slope is not near the difference of two losses, by more than curvature and rounding explain.

    Args:
        found: by differentiation.
        plus, minus: the losses on both sides.
        eps: their distance from the weights.
        rounding: relative rounding error of a loss.
    """
    loss, slope, measured = found.loss.item(), found.slope.item(), (plus - minus) / (2.0 * eps)
    bend = abs(plus + minus - 2.0 * loss) / eps
    if abs(slope - measured) > NEAR * max(abs(slope), abs(measured)) + bend + rounding * abs(loss) / eps:
        logger.warning(
            "along the first direction the loss has the slope %.4g by differentiation, and %.4g by its values at a "
            "distance of eps=%g: part of it is computed where derivatives end (a detach(), an argmax, code outside of "
            "torch), or it moves in steps; 'forward_grad' follows the derivative, estimator='spsa' the values",
            *(slope, measured, eps),
        )


def unseen() -> ModelError:
    """For a model whose loss is NaN with dual tensors and finite without."""
    return ModelError(
        "this model uses weights where they cannot be observed (compiled, TorchScript or C++ code), so that "
        f"estimator='forward_grad' cannot differentiate it; {OTHERWISE}"
    )


def _problem(error: NotImplementedError) -> ModelError | None:
    """Names the operation without a forward derivative; None for another error."""
    found = OPERATION.search(str(error))
    name = found.group(1) if found else _function(error.__traceback__) if FUNCTION in str(error) else None
    return None if name is None else _without(name)


def _without(name: str) -> ModelError:
    return ModelError(
        f"the operation {name} has no forward derivative, which estimator='forward_grad' needs of all that the loss "
        f"is computed with; {OTHERWISE}"
    )


def _function(trace: TracebackType | None) -> str:
    """The name of the ``autograd.Function`` that an error came from: its context is on the way to the error."""
    name = FUNCTION
    while trace is not None:
        context = trace.tb_frame.f_locals.get("self")
        if isinstance(context, FunctionCtx):
            name = type(context).__name__.removesuffix("Backward")
        trace = trace.tb_next
    return name
