"""What a layer has returned in one call, and how to tell that it would return the same again.

The result of a call depends on its arguments, on the layer's weights and attributes, on the random generators, and on
settings such as autocast. A record has all of these as they were, and counts for another call only if they are the same
to the bit. No record is made of a call that changes its arguments or the layer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.overrides import _get_current_function_mode_stack

from ..dispatch import watchers
from ..forward_state import HOOKS, INTERNAL
from ..modes import moved_generators, rng_state, same_rng
from ..stand_ins import same_bits
from .function_mode import ProbeMode
from .functional import FunctionalMode

#: Types of arguments, besides tensors, that are equal if they compare equal.
VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, torch.layout)

DEVICES = ("cpu", "cuda")

#: How the names of the modules begin whose hooks give the modules of a layer their weights.
OURS = "zo_core."


class Unfit(Exception):
    """A call cannot be recorded; the text says why."""


class Record:
    """A call of a layer: what it depends on, and once it is complete, what it has returned.

    Args:
        layer: the layer.
        arguments: all of them.
        moving: tensors whose memory probes exchange, by ``id``.

    Raises:
        Unfit: the arguments cannot be compared, or somebody looks at what happens within the layer.
    """

    def __init__(self, layer: nn.Module, arguments: Any, moving: Collection[int]):
        self.layer, self.moving, self.arguments = layer, moving, arguments
        self.leaves: list[Any] = []
        self.form = spread(arguments, self.leaves)
        self.versions = _versions(self.leaves)
        self.around = surroundings(layer, moving)
        self.before = rng_state()
        self.after: dict[str, Any] = {}

    def complete(self, result: Any) -> None:
        """Takes in the result.

        Raises:
            Unfit: the call has changed its arguments or the layer, or has not returned new tensors.
        """
        name = type(self.layer).__name__
        leaves: list[Any] = []
        form, self.arguments = spread(self.arguments, leaves), None
        kept = form == self.form and all(a is b for a, b in zip(self.leaves, leaves, strict=True))
        if not kept or _versions(self.leaves) != self.versions:
            raise Unfit(f"{name} writes into its arguments")
        if not same(self.around, surroundings(self.layer, self.moving)):
            raise Unfit(f"{name} changes its attributes, or settings of torch")
        self.outputs: list[Any] = []
        self.result = spread(result, self.outputs)
        self.output_versions = _versions(self.outputs)
        memory = {leaf.untyped_storage()._cdata for leaf in self.leaves if isinstance(leaf, Tensor)}
        for leaf in self.outputs:
            if isinstance(leaf, Tensor):
                place, like = leaf.untyped_storage()._cdata, torch.empty_like(leaf, device="meta")
                if place in memory or like.stride() != leaf.stride():
                    raise Unfit(f"{name} returns one of its arguments, or views of one tensor")
                memory.add(place)
        now = rng_state()
        moved = moved_generators(now, self.before)
        self.before = {kind: self.before[kind] for kind in moved}
        self.after = {kind: now[kind] for kind in moved}

    def matches(self, other: Record) -> bool:
        """Whether another call, which is not complete, would have the result of this one, which nobody has changed."""
        if other.form != self.form or not same(self.around, other.around):
            return False
        if _versions(self.outputs) != self.output_versions or _versions(self.leaves) != self.versions:
            return False
        if not all(map(_same_leaf, self.leaves, other.leaves)):
            return False
        return same_rng(self.before, {kind: other.before[kind] for kind in self.before})

    def again(self) -> Any:
        """The result in tensors of its own, so that whoever writes into them changes nobody else's."""
        copies = (leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self.outputs)
        return gathered(self.result, copies)


def surroundings(layer: nn.Module, moving: Collection[int]) -> list[Any]:
    """What a call depends on besides arguments, generators and the weights that move.

    Raises:
        Unfit: somebody looks at what happens within the layer.
    """
    if _global_forward_hooks or _global_forward_pre_hooks:
        raise Unfit("a hook of all modules is registered")
    casts = [(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in DEVICES]
    modes = [type(m) for m in _get_current_function_mode_stack() if not isinstance(m, (ProbeMode, FunctionalMode))]
    found: list[Any] = [casts, torch.get_default_dtype(), modes, len(watchers())]
    for part in layer.modules():
        for hook in () if part is layer else (hook for name in HOOKS for hook in vars(part)[name].values()):
            if callable(hook) and not str(getattr(hook, "__module__", "")).startswith(OURS):
                raise Unfit(f"a {type(part).__name__} in {type(layer).__name__} has a hook")
        found += (part, part.training)
        attributes = [value for name, value in vars(part).items() if name not in INTERNAL]
        for value in (*attributes, *part._parameters.values(), *part._buffers.values()):
            found.append(value)
            if isinstance(value, Tensor) and id(value) not in moving:
                found += (value.data_ptr(), value._version)
    return found


def same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two lists have the same objects, or equal values of simple types."""
    return len(a) == len(b) and all(x is y or _equal(x, y) for x, y in zip(a, b, strict=True))


def _equal(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if type(a) in (tuple, list):
        return same(a, b)
    return type(a) in VALUES and repr(a) == repr(b)  # 0.0 == -0.0


def spread(value: Any, leaves: list[Any]) -> Any:
    """Appends what is in nested tuples, lists and dicts to ``leaves``; returns their form, for `gathered`.

    Raises:
        Unfit: something in them can be neither compared nor repeated.
    """
    if type(value) in (tuple, list):
        return type(value), tuple(spread(entry, leaves) for entry in value)
    if type(value) is dict and all(type(key) in VALUES for key in value):
        return dict, tuple((key, spread(entry, leaves)) for key, entry in value.items())
    if type(value) is Tensor:
        plain = value.layout == torch.strided and not (value.is_meta or value.is_inference() or value.requires_grad)
        if not plain or value.is_conj() or value.is_neg() or forward_ad.unpack_dual(value).tangent is not None:
            raise Unfit("a layer gets or returns a tensor that does not consist of values alone")
    elif type(value) not in VALUES:
        hint = "; write model.config.use_cache = False" if "Cache" in type(value).__name__ else ""
        raise Unfit(f"a layer gets or returns a {type(value).__name__}{hint}")
    leaves.append(value)
    return None


def gathered(form: Any, leaves: Iterator[Any]) -> Any:
    """The inverse of `spread`."""
    if form is None:
        return next(leaves)
    kind, parts = form
    if kind is dict:
        return {key: gathered(part, leaves) for key, part in parts}
    return kind(gathered(part, leaves) for part in parts)


def _same_leaf(known: Any, now: Any) -> bool:
    if not isinstance(known, Tensor) or not isinstance(now, Tensor):
        return same([known], [now])
    alike = known.stride() == now.stride() and known.device == now.device
    return known is now or (alike and same_bits(known, now))


def _versions(leaves: Sequence[Any]) -> list[int]:
    return [leaf._version for leaf in leaves if isinstance(leaf, Tensor)]
