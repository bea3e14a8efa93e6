"""Parameters whose values are temporarily elsewhere: in a store, or in the factors of a window.

Between two steps any code may read a model's parameters: callbacks, weight averaging, code that copies a model. A
parameter without its values at that time is made a stand-in, which is the same object with another class. The
first torch function that reads it loads the values, and it is an ordinary parameter again. Reading its shape, dtype
or device does not load them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import lru_cache
from types import GetSetDescriptorType
from typing import Any

import torch
from torch import Tensor

#: Attributes and methods of a tensor that do not depend on its values.
METADATA = {
    getattr(Tensor, name).__get__
    for name in (
        *("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "is_cpu", "layout", "is_meta"),
        *("is_leaf", "grad", "grad_fn", "is_quantized", "is_sparse", "itemsize", "nbytes", "is_nested"),
    )
} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__}

#: Functions that need no values: metadata, and functions that ignore the values.
WITHOUT_VALUES = (
    METADATA
    | {getattr(Tensor, name).__set__ for name in ("grad", "requires_grad")}
    | {
        getattr(Tensor, name).__get__
        for name in dir(Tensor)
        if name.startswith("is_") and isinstance(getattr(Tensor, name), GetSetDescriptorType)
    }
    | {
        torch._has_compatible_shallow_copy_type,
        Tensor.requires_grad_,
        Tensor.nelement,
        Tensor.ndimension,
        Tensor.element_size,
        Tensor.get_device,
    }
    | {Tensor.register_hook, Tensor.register_post_accumulate_grad_hook}
)

#: Functions that return the tensor itself if it already has the requested type and place.
MOVES = frozenset({Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.contiguous})

SET_DATA = getattr(Tensor, "data").__set__  # noqa: B009

Bring = Callable[[], object]


class StandIn:
    """The first base of every class of stand-ins; the second is the parameter's original class."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in MOVES and isinstance(args[0], StandIn):
            with torch.DisableTorchFunctionSubclass():
                if func(*args, **kwargs) is args[0]:
                    return args[0]
        if func == SET_DATA and args[0] is args[1]:
            return None  # as `nn.Module.to` does where nothing is to be moved
        # What is empty has no values to keep, as what bitsandbytes makes of 4-bit weights that are elsewhere.
        if func not in WITHOUT_VALUES and not (func == SET_DATA and not args[1].numel()):
            _bring(args)
            _bring(kwargs.values())
        with torch.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        _bring([self])
        return copy.deepcopy(self, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        _bring([self])
        return self.__reduce_ex__(protocol)


@lru_cache(maxsize=64)
def _class_of(cls: type) -> type:
    return type(cls)("StandIn", (StandIn, cls), {})


def stand_in(parameter: Tensor, bring: Bring) -> None:
    """Makes a parameter a stand-in.

    Args:
        parameter: any parameter; an existing stand-in gets the new ``bring``.
        bring: called when the values are needed; makes the parameter `ordinary` and points it at them.
    """
    vars(parameter)["_zo_bring"] = bring
    if not isinstance(parameter, StandIn):
        parameter.__class__ = _class_of(type(parameter))


def ordinary(parameter: Tensor) -> None:
    """Undoes `stand_in`."""
    if isinstance(parameter, StandIn):
        parameter.__class__ = type(parameter).__mro__[2]
        del vars(parameter)["_zo_bring"]


def _bring(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, StandIn):
            bring = vars(value)["_zo_bring"]
            with torch.no_grad(), torch.inference_mode(False), torch.DisableTorchFunction():
                bring()
            assert not isinstance(value, StandIn), "who brings the values makes the parameter an ordinary one"
        elif isinstance(value, (list, tuple)):
            _bring(value)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape hold the same bits, NaN included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(t.detach().reshape(-1).contiguous().view(torch.uint8) for t in (a, b)))
