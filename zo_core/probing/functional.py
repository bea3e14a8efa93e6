"""Realising a probe without copies: linear layers and embeddings add a low-rank term to their result.

    y = x W^T + (x right^T) left^T          with  z = left right  of low rank

A `TorchFunctionMode` sees every call of a torch function with the parameters among its arguments. Where a
matrix is used as `F.linear`, `F.embedding` or `torch.addmm` (the ``Conv1D`` of transformers) do, the term is
added to the result, whatever the caller, so functional tied heads are covered; any other use of a parameter gets a
perturbed copy in its place, tensor by tensor. The parameters themselves show NaN throughout: code that Python
cannot see computes with NaN, and the oracle notices, as it does for materialised probes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..noise import Direction, LowRank, LowRankDirection, Noise
from ..noise.direction import float32
from ..records import Point
from ..stand_ins import METADATA
from ..targets import Slot
from .function_mode import LOSS_FUNCTIONS, upcast
from .materialise import Materialised
from .scratch import ScratchPool
from .view import ProbeView

#: Assignments to the parameter object, which do not use its values.
ASSIGNMENTS = {getattr(Tensor, name).__set__ for name in ("data", "grad", "requires_grad")} | {Tensor.requires_grad_}


class Sight:
    """The weights as ``values + s``, without forming that sum where possible.

    Args:
        slots: the slots that differ from the values in memory.
        values: the values of a slot in memory.
        direction: ``s`` of a slot.
        pool: memory for copies.
    """

    def __init__(
        self,
        slots: Collection[Slot],
        values: Callable[[Slot], Tensor],
        direction: Callable[[Slot], Direction],
        pool: ScratchPool,
    ):
        self.slots = {id(tensor): slot for slot in slots for tensor in slot.tensors}
        self.used = False
        self.values, self.direction, self.pool = values, direction, pool
        self.known: dict[tuple[Slot, torch.dtype], tuple[Tensor, Tensor, float] | None] = {}
        self.copies: OrderedDict[Slot, Tensor] = OrderedDict()
        #: Copies are kept for later uses, as many as fit into the memory of the largest slot.
        self.room = max((slot.tensor.numel() * slot.tensor.element_size() for slot in slots), default=0)

    def factors(self, slot: Slot, dtype: torch.dtype) -> tuple[Tensor, Tensor, float] | None:
        """``left``, ``right`` and the decay of a matrix slot, in ``dtype``; None if ``s`` is of full rank, or 0.

        Also None for a slot whose tensors differ: uses of its transpose would need other factors.
        """
        self.used = True
        if (slot, dtype) not in self.known:
            direction = self.direction(slot)
            found = None
            alike = slot.region is None
            if alike and isinstance(direction, LowRankDirection) and len(direction.shape) == 2 and not direction.still:
                left, right = direction.factors_in(dtype, self.values(slot).device)
                found = left, right, float32(direction.decay)
            self.known[slot, dtype] = found
        return self.known[slot, dtype]

    def copy(self, slot: Slot) -> Tensor:
        """The sum itself; the values, if nothing is added to them."""
        self.used = True
        copy = self.copies.get(slot)
        if copy is None:
            values, direction = self.values(slot).detach(), self.direction(slot)
            if direction.still:
                return values
            copy = direction.add_to(values, out=slot.room(values, self.pool.take))
            self.copies[slot] = copy
            while len(self.copies) > 1 and sum(c.numel() * c.element_size() for c in self.copies.values()) > self.room:
                self.copies.popitem(last=False)
        return copy


class FunctionalMode(TorchFunctionMode):
    """Makes torch functions compute with the weights of a `Sight`.

    Args:
        sight: the weights.
        losses: upcast half-precision inputs of loss functions, as `ProbeMode` does.
    """

    #: Functions with a form of their own for matrices of low rank; it returns None where it does not apply.
    forms: ClassVar[dict[Callable[..., Any], str]] = {
        F.linear: "linear",
        F.embedding: "embedding",
        torch.addmm: "addmm",
    }

    def __init__(self, sight: Sight, losses: bool):
        super().__init__()
        self.sight, self.slots, self.losses = sight, sight.slots, losses

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in METADATA and func not in ASSIGNMENTS:
            if func in self.forms:
                found = getattr(self, self.forms[func])(*args, **kwargs)
                if found is not None:
                    return found
            if self._concerned(args):
                args = self.replaced(args)
            if kwargs and self._concerned(kwargs.values()):
                kwargs = {name: self.replaced(value) for name, value in kwargs.items()}
        if self.losses and func in LOSS_FUNCTIONS:
            args = tuple(upcast(value) for value in args)
            kwargs = {name: upcast(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _concerned(self, values: Iterable[Any]) -> bool:
        """Whether a parameter may be among ``values``; most calls have none, and there are many calls."""
        for value in values:  # noqa: SIM110 (runs at every call of a torch function, and any() is slower)
            if id(value) in self.slots or type(value) is tuple or type(value) is list:
                return True
        return False

    def replaced(self, value: Any) -> Any:
        """The value, with copies for the parameters in it."""
        if isinstance(value, Tensor):
            slot = self.slots.get(id(value))
            return value if slot is None else slot.seen_by(value, self.sight.copy(slot))
        if type(value) in (tuple, list):
            return type(value)(self.replaced(entry) for entry in value)
        return value

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        slot = self.slots.get(id(weight))
        if slot is None or (known := self.sight.factors(slot, weight.dtype)) is None:
            return None
        left, right, decay = known
        input, bias, values = self.replaced(input), self.replaced(bias), self.sight.values(slot)
        scaled = input if decay == 1.0 else input * decay
        if input.dtype != values.dtype or torch.is_autocast_enabled(input.device.type):
            y = F.linear(scaled, values, bias)
            left, right = self._in_type_of(y, slot)
            return y + F.linear(F.linear(input.to(y.dtype), right), left)
        # The term comes first and the product is added to it, which saves a pass over a large result.
        inner = F.linear(input.reshape(-1, input.shape[-1]), right)
        y = torch.mm(inner, left.t()) if bias is None else torch.addmm(bias, inner, left.t())
        y.addmm_(scaled.reshape(-1, input.shape[-1]), values.t())
        return y.view(*input.shape[:-1], len(left))

    def embedding(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        slot = self.slots.get(id(weight))
        renormed = kwargs.get("max_norm") is not None or (len(args) > 1 and args[1] is not None)
        if slot is None or renormed or (known := self.sight.factors(slot, torch.float32)) is None:
            return None
        left, right, decay = known
        y = F.embedding(input, self.sight.values(slot), *args, **kwargs)
        if decay != 1.0:
            y = y * decay
        return y.add_(torch.matmul(F.embedding(input, left), right))

    def addmm(self, input: Tensor, mat1: Tensor, mat2: Tensor, **kwargs: Any) -> Tensor | None:
        slot = self.slots.get(id(mat2))
        if slot is None or kwargs or (known := self.sight.factors(slot, mat2.dtype)) is None:
            return None
        decay = known[2]
        mat1 = self.replaced(mat1)
        y = torch.addmm(self.replaced(input), mat1 if decay == 1.0 else mat1 * decay, self.sight.values(slot))
        left, right = self._in_type_of(y, slot)
        return y.addmm_(mat1.to(y.dtype) @ left, right)

    def _in_type_of(self, result: Tensor, slot: Slot) -> tuple[Tensor, Tensor]:
        """The factors in the dtype that a function has computed in, which autocast may have chosen."""
        known = self.sight.factors(slot, result.dtype)
        assert known is not None
        return known[0], known[1]


def realisation(noise: Noise) -> type[Materialised]:
    """How probes along a noise are realised."""
    return Functional if isinstance(noise.plain, LowRank) else Materialised


class Functional(Materialised):
    """Runs code with the slots perturbed along directions of low rank, without copies of the matrices."""

    def moves(self, point: Point) -> bool:
        return True  # pending updates also count at the unperturbed point

    def view(self, point: Point, original: Callable[[Slot], Tensor]) -> ProbeView:
        return FunctionalView(self, point, original)

    def hook(self) -> None:
        """Does nothing: no hooks are needed at the beginning and end of modules."""


class FunctionalView(ProbeView):
    """What one probe sees: the parameters show NaN, and torch functions get the perturbed weights in their place."""

    def __init__(self, owner: Materialised, point: Point, original: Callable[[Slot], Tensor]):
        self.sight = Sight(owner.slots, original, lambda slot: owner.direction(slot, point), owner.pool)
        self.whole = owner.whole
        super().__init__(owner, point, original)

    @property
    def used(self) -> bool:
        return self.given or self.sight.used

    def mode(self) -> TorchFunctionMode:
        return super().mode() if self.whole else FunctionalMode(self.sight, losses=True)
