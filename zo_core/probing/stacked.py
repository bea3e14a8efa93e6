"""All probes of a step in one forward: the model runs once, with a value per probe wherever weights differ.

The closure runs under `torch.vmap` over the probes, so its own code sees ordinary shapes and the batch as it is;
what depends on a weight has one copy per probe, and every torch function treats the copies separately.
Losses, masks, reductions and random numbers are therefore those of separate probes by construction. A matrix is
read once for all copies,

    y_c = x_c W^T + (x_c right^T) left_c^T          right [K, columns] shared, left_c [m, K] of copy c

and small tensors (norms, biases) have a perturbed value per copy. A matrix in any other function would need a copy
per probe, and is not stackable. As in `functional`, the parameters show NaN throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import resolve_name

from ..noise import Alternatives, Direction, LowRankDirection, stacked_factors, stacked_values
from ..noise.direction import float32
from ..records import Point
from ..stand_ins import METADATA
from ..targets import Slot
from .function_mode import HALF, LOSS_FUNCTIONS, upcast
from .functional import FunctionalMode, Sight
from .scratch import ScratchPool

_functorch = torch._C._functorch

#: Losses that end in a mean or a sum: computed copy by copy, in the memory of one.
REDUCTIONS = LOSS_FUNCTIONS - {
    *(F.log_softmax, F.logsigmoid, F.cosine_similarity, torch.log_softmax, torch.logsumexp),
    *(Tensor.log_softmax, Tensor.logsumexp),
}


class NotStackable(Exception):
    """The closure does something that has no form for several probes at once."""


class _Matrix(NotStackable):
    """A function would need a copy of a matrix for each probe; the text is the slot's key."""


class StackedSight(Sight):
    """The weights of several probes, ``values + s_c`` for each copy c.

    Args:
        slots: what is perturbed.
        values: the values of a slot in memory.
        alternatives: called with a slot and all points, returns one direction per point.
        points: one per copy.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        values: Callable[[Slot], Tensor],
        alternatives: Callable[[Slot, Sequence[Point]], Alternatives],
        points: Sequence[Point],
    ):
        super().__init__(slots, values, _no_sum, ScratchPool())
        self.alternatives = lambda slot: alternatives(slot, points)
        self.count = len(points)
        self.stacks: dict[Slot, Tensor] = {}

    def low_rank(self, slot: Slot) -> tuple[Alternatives, float] | None:
        """The directions of a matrix, and the decay of its values; None if they are of full rank."""
        found = self.alternatives(slot)
        common = found.common
        if slot.region is not None or not isinstance(common, LowRankDirection) or len(common.shape) != 2:
            return None
        return found, float32(common.decay)

    def lefts(self, directions: Alternatives, like: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``left_c`` as ``[copies, m, K]``, and ``right`` ``[K, columns]``.

        Args:
            directions: the directions of a matrix.
            like: determines the device and the dtype of the factors.
            rows: indices of the rows to return; None for all m.
        """
        left, right = stacked_factors(directions, like.device, rows, apart=like.dtype in HALF)
        return left.to(like.dtype), right.to(like.dtype)

    def stack(self, slot: Slot) -> Tensor:
        """The values of all copies, ``[copies, *shape]``, of a slot whose direction is of full rank.

        Raises:
            _Matrix: the slot is a matrix of low rank or a scale, which is not copied.
        """
        if slot not in self.stacks:
            found = self.alternatives(slot)
            if slot.scaling is not None or isinstance(found.common, LowRankDirection):
                raise _Matrix(slot.key)
            values = self.values(slot).detach()
            stack = stacked_values(values, found)
            self.stacks[slot] = stack if slot.region is None else slot.region.spread(values, stack)
        return self.stacks[slot]


def _no_sum(slot: Slot) -> Direction:
    raise _Matrix(slot.key)


class StackedMode(FunctionalMode):
    """Makes torch functions compute with the weights of all copies; has to be entered inside of `torch.vmap`."""

    sight: StackedSight
    forms: ClassVar[dict[Callable[..., Any], str]] = {
        **FunctionalMode.forms,
        F.layer_norm: "layer_norm",
        F.scaled_dot_product_attention: "attention",
    }

    def __init__(self, sight: StackedSight):
        super().__init__(sight, losses=True)
        level = _functorch.maybe_current_level()
        assert level is not None, "to be entered inside of torch.vmap"
        self.level = level

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        inside = _functorch.maybe_current_level() != self.level  # in a transform in the code of the model
        try:
            if func in REDUCTIONS or (inside and func not in METADATA):
                args = self.replaced(args)
                kwargs = {name: self.replaced(value) for name, value in (kwargs or {}).items()}
                return func(*args, **kwargs) if inside else self.reduced(func, args, kwargs)
            return super().__torch_function__(func, types, args, kwargs)
        except _Matrix as matrix:
            raise NotStackable(
                f"{_name(func)} uses {matrix}, and cannot be computed for several probes at once"
            ) from None

    def replaced(self, value: Any) -> Any:
        """The value, with all copies in place of the parameters in it."""
        if isinstance(value, Tensor):
            slot = self.slots.get(id(value))
            return value if slot is None else self.wrap(slot.seen_by(value, self.sight.stack(slot)))
        return super().replaced(value)

    def wrap(self, stack: Tensor) -> Tensor:
        """``[copies, *shape]`` as the batched tensor of shape ``shape`` that the code of the model sees."""
        if _functorch.maybe_current_level() != self.level:
            raise NotStackable("a torch.func transform inside of the closure uses the trained weights")
        return _functorch._add_batch_dim(stack, 0, self.level)

    def unwrap(self, value: Any) -> Tensor | None:
        """The inverse of `wrap`; None for a value that is the same in all copies."""
        if not isinstance(value, Tensor) or not _functorch.is_batchedtensor(value):
            return None
        if _functorch.maybe_get_level(value) != self.level:
            raise NotStackable("a torch.func transform inside of the closure uses the trained weights")
        stack: Tensor = _functorch.get_unwrapped(value)
        return stack.movedim(_functorch.maybe_get_bdim(value), 0)

    # Matrices

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        slot = self.slots.get(id(weight))
        if slot is None or (found := self.sight.low_rank(slot)) is None:
            return self._frozen(input, weight, bias) if slot is None and id(bias) not in self.slots else None
        bias = self.replaced(bias)
        shift = self.unwrap(bias)
        x = self._shared(self.replaced(input))
        directions, decay = found
        y = F.linear(x if decay == 1.0 else x * decay, self.sight.values(slot), bias if shift is None else None)
        left, right = self.sight.lefts(directions, y)
        inner = F.linear(x.to(y.dtype), right)
        if shift is not None:  # added together with the factors, which saves a pass over y
            left = torch.cat([left, shift.unsqueeze(2).to(y.dtype)], 2)
            inner = F.pad(inner, (0, 1), value=1.0)
        return self.wrap(self._added(y, inner, left.transpose(1, 2)))

    def _frozen(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """Computes a layer that does not move in one product for all copies."""
        stack = self.unwrap(input)
        if stack is None or self.unwrap(weight) is not None or self.unwrap(bias) is not None:
            return None
        return self.wrap(F.linear(stack, weight, bias))

    def _shared(self, value: Tensor) -> Tensor:
        """The value as ``[copies, ...]``, or ``[1, ...]`` if it is the same in all copies."""
        stack = self.unwrap(value)
        return value.unsqueeze(0) if stack is None else stack

    def _added(self, y: Tensor, inner: Tensor, left: Tensor) -> Tensor:
        """``y + inner left`` for each copy, ``[copies, ..., m]``; ``y`` and ``inner`` may have a leading 1 instead."""
        rows = y.shape[1:-1]
        flat, inner = y.reshape(len(y), -1, y.shape[-1]), inner.reshape(len(inner), -1, inner.shape[-1])
        if len(y) == len(left):
            flat = flat.baddbmm_(inner, left)
        else:
            flat = torch.baddbmm(flat, inner.expand(len(left), -1, -1), left)
        return flat.view(len(left), *rows, y.shape[-1])

    def embedding(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        slot = self.slots.get(id(weight))
        renormed = kwargs.get("max_norm") is not None or (len(args) > 1 and args[1] is not None)
        if slot is None or renormed or self.unwrap(input) is not None:
            return None
        if (found := self.sight.low_rank(slot)) is None:
            return None
        directions, decay = found
        values = self.sight.values(slot)
        left, right = stacked_factors(directions, values.device, input.reshape(-1))
        y = F.embedding(input, values, *args, **kwargs)
        if decay != 1.0:
            y = y * decay
        term = torch.matmul(left, right).view(-1, *y.shape)
        return self.wrap(term.add_(y) if term.dtype == y.dtype else (y + term).to(y.dtype))

    def addmm(self, input: Tensor, mat1: Tensor, mat2: Tensor, **kwargs: Any) -> Tensor | None:
        slot = self.slots.get(id(mat2))
        if slot is None or kwargs or (found := self.sight.low_rank(slot)) is None:
            return None
        x, shift = self._shared(self.replaced(mat1)), self._shared(self.replaced(input))
        directions, decay = found
        y = torch.matmul(x if decay == 1.0 else x * decay, self.sight.values(slot))
        left, right = self.sight.lefts(directions, y)
        inner = torch.matmul(x.to(y.dtype), left)
        y = y + shift.view(len(shift), *(1,) * (3 - shift.ndim), *shift.shape[1:])
        return self.wrap(self._added(y, inner, right.expand(self.sight.count, -1, -1)))

    # Functions that vmap would decompose

    def layer_norm(
        self, input: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> Tensor | None:
        """Layer norm in which half precision is rounded once, as in the kernel for one copy."""
        if input.dtype not in HALF:
            return None
        weight, bias = upcast(self.replaced(weight)), upcast(self.replaced(bias))
        return F.layer_norm(input.float(), shape, weight, bias, eps).to(input.dtype)

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor | None:
        """Attention in one call for all copies, whose batches are concatenated; dropout is left to vmap."""
        dropout = args[0] if args else kwargs.get("dropout_p", 0.0)
        count, given = self.sight.count, (query, key, value)
        if dropout or any(one.ndim != 4 for one in given) or all(self.unwrap(one) is None for one in given):
            return None
        q, k, v = (self._shared(one).expand(count, *one.shape).flatten(0, 1) for one in given)
        if attn_mask is not None:
            mask = self._shared(attn_mask)
            if mask.ndim == 5 and (len(mask) > 1 or mask.shape[1] > 1):
                attn_mask = mask.expand(count, len(query), *mask.shape[2:]).flatten(0, 1)
            elif len(mask) > 1:
                return None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask, *args, **kwargs)
        return self.wrap(y.unflatten(0, (count, -1)))

    def reduced(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Computes a loss function of each copy separately, in float32."""
        stacks = [self.unwrap(value) for value in args]
        named = {name: self.unwrap(value) for name, value in kwargs.items()}
        if all(stack is None for stack in (*stacks, *named.values())):
            return func(*map(upcast, args), **{name: upcast(value) for name, value in kwargs.items()})
        losses = [
            func(
                *(upcast(value if s is None else s[c]) for value, s in zip(args, stacks, strict=True)),
                **{name: upcast(value if (s := named[name]) is None else s[c]) for name, value in kwargs.items()},
            )
            for c in range(self.sight.count)
        ]
        return self.wrap(torch.stack(losses))


def transformed() -> bool:
    """Whether the running code is within a transform of `torch.func`, such as `torch.vmap`."""
    return _functorch.maybe_current_level() is not None


def is_stack(value: Any) -> bool:
    """Whether a value is batched over the copies that a closure runs on."""
    return isinstance(value, Tensor) and _functorch.is_batchedtensor(value)


def each_copy(value: Any) -> list[Any]:
    """The value in each of the copies that a closure runs on; outside of stacked probes there is one."""
    if is_stack(value):
        return list(_functorch.get_unwrapped(value).movedim(_functorch.maybe_get_bdim(value), 0).unbind())
    return [value]


@lru_cache
def _name(func: Callable[..., Any]) -> str:
    return resolve_name(func) or getattr(func, "__name__", "a function")
