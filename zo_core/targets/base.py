"""What training may change: a target returns these tensors of a model as slots."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import ModelError
from ..noise.direction import FLOAT_DTYPES, Scaling
from ..noise.parts import Part
from ..registry import Registry
from .memory import Region, as_it_lies, shows_twice

WRAPPERS = ("module", "_orig_mod")


@dataclass(frozen=True, eq=False)
class Slot:
    """One tensor that moves, under a key that is the same in every trainer.

    Attributes:
        key: stable name; together with a seed it determines the slot's noise.
        tensors: the tensor, and any other tensor objects that share its memory (tied weights).
        modules: the modules that hold one of ``tensors`` directly.
        scaling: how quantisation scales move; None for ordinary weights.
        own: hyperparameters of this slot for the optimizer's group (``lr``, ``eps``), where they differ
            from those of the run.
        region: how each tensor views the memory; None if they all have the same view.
        part: which part of a larger tensor this process holds; None if it holds all of it.
    """

    key: str
    tensors: tuple[Tensor, ...]
    modules: tuple[nn.Module, ...]
    scaling: Scaling | None = None
    own: Mapping[str, float] = field(default_factory=dict)
    region: Region | None = None
    part: Part | None = None

    def __repr__(self) -> str:
        shape, dtype = list(self.shape), str(self.tensor.dtype).removeprefix("torch.")
        return f"Slot({self.key!r}, {dtype} {shape})"

    @property
    def tensor(self) -> Tensor:
        return self.tensors[0]

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor; of a part, that of the whole one."""
        return self.tensor.shape if self.part is None else self.part.whole

    @property
    def leads(self) -> tuple[Tensor, ...]:
        """The tensors that view the slot in the order in which the noise counts its elements."""
        return self.tensors if self.region is None else self.tensors[: self.region.leads]

    def led_by(self, ids: Container[int]) -> Slot:
        """The same slot, with a tensor whose ``id`` is in ``ids`` first: the one that an optimizer holds."""
        first = sorted(self.leads, key=lambda tensor: id(tensor) not in ids)
        return replace(self, tensors=(*first, *self.tensors[len(first) :]))

    def seen(self, values: Tensor) -> list[Tensor]:
        """The view of each tensor if the first one has ``values``, which are in memory or from `room`."""
        if self.region is None:
            return [values] * len(self.tensors)
        return [self.region.seen(index, values) for index in range(len(self.tensors))]

    def seen_by(self, tensor: Tensor, values: Tensor) -> Tensor:
        """As `seen`, for one of the tensors."""
        if self.region is None:
            return values
        index = next(index for index, held in enumerate(self.tensors) if held is tensor)
        return self.region.seen(index, values)

    def room(self, values: Tensor, take: Callable[[Tensor], Tensor]) -> Tensor:
        """Memory for other values of the first tensor; ``take`` allocates a tensor like another one."""
        return take(values) if self.region is None else self.region.room(values, take)


@as_it_lies
def shapes_of(slots: Iterable[Slot]) -> list[tuple[str, torch.Size]]:
    """Key and shape of each slot."""
    return [(slot.key, slot.shape) for slot in slots]


def by_number(key: str) -> list[tuple[int, str]]:
    """For sorting keys by name, and parts that are numbers by these: "layers.2" comes before "layers.10"."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in key.split(".")]


@dataclass(frozen=True)
class Target:
    """Chooses the slots of a model.

    Class attributes:
        name: its name in the registry.
        default_clip: bound on the coefficients if the configuration sets none.
        of_quantised: whether it moves parts of quantised weights, which trainers otherwise refuse to train.
    """

    name: ClassVar[str]
    default_clip: ClassVar[float] = math.inf
    of_quantised: ClassVar[bool] = False

    def chosen(self, model: nn.Module) -> Target:
        """The target to use for this model: itself, unless it chooses among others."""
        return self

    def slots(self, model: nn.Module) -> list[Slot]:
        """The slots, each tensor in exactly one of them.

        Raises:
            ModelError: the model has nothing that this target can move, or it is on ``meta``.
        """
        raise NotImplementedError

    def relink(self, slots: Iterable[Slot]) -> None:
        """Makes ``slots`` and the modules that compute with them hold the same tensors, after the model was moved.

        `Module.to` keeps parameter objects, so most targets have nothing to do.
        """


TARGETS: Registry[Target] = Registry("target", Target)


def slot_keys(names: Iterable[str]) -> list[str]:
    """Parameter names without the prefixes that wrappers add.

    Removes ``module`` and ``_orig_mod`` anywhere, then the longest run of leading components that
    all names share, always leaving the last component. So a bare model, the same model inside a
    LightningModule and a compiled one give the same keys, hence the same noise. Names that differed
    only by a wrapper are numbered, because no two slots may have the same noise.
    """
    split = []
    for name in names:
        *path, last = name.split(".")
        split.append([*(part for part in path if part not in WRAPPERS), last])
    shared = 0
    while all(len(parts) > shared + 1 for parts in split) and len({parts[shared] for parts in split}) == 1:
        shared += 1
    keys: list[str] = []
    uses: Counter[str] = Counter()
    for parts in split:
        key = ".".join(parts[shared:])
        keys.append(f"{key}#{uses[key]}" if uses[key] else key)
        uses[key] += 1
    return keys


@as_it_lies
def check_tensor(name: str, tensor: Tensor) -> None:
    """Raises `ModelError` for a tensor that cannot be moved."""
    if tensor.is_meta:
        raise ModelError(
            f"parameter {name!r} is on the meta device and has no values; load the weights before training, "
            "for example with model.to_empty(device='cpu') and load_state_dict, or from_pretrained"
        )
    if tensor.dtype not in FLOAT_DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
        raise ModelError(
            f"parameter {name!r} has dtype {tensor.dtype}, which cannot be moved; use one of {known}, "
            "or requires_grad_(False) to leave it alone"
        )
    if type(tensor) is not torch.Tensor and nn.Parameter not in type(tensor).__mro__:
        raise ModelError(
            f"parameter {name!r} is a {type(tensor).__name__}, whose values are not one plain tensor; "
            "requires_grad_(False) leaves it alone"
        )
    if shows_twice(tensor) and not _stands_for(tensor):
        raise ModelError(
            f"parameter {name!r} of shape {list(tensor.shape)} shows several elements at one place in memory (its "
            f"strides are {list(tensor.stride())}, as after expand), so they cannot move by themselves; make the "
            "parameter of the tensor before it was expanded, or of tensor.clone()"
        )


def _stands_for(tensor: Tensor) -> bool:
    """Whether a tensor is the placeholder of a streamed one: a single NaN, expanded."""
    return tensor.untyped_storage().nbytes() == tensor.element_size() and bool(tensor.detach().flatten()[0].isnan())


@as_it_lies
def memory_of(tensor: Tensor) -> tuple[object, ...]:
    """A key that is equal for two tensors exactly if they view the same elements in the same order."""
    if tensor.numel() == 0 or tensor.is_meta:  # without memory; on meta, a tensor is tied only to itself
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def plain_parameters(module: nn.Module, recurse: bool = True) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that hold the parameters' values, by name: themselves, or the parts of tensor subclasses."""
    for name, parameter in module.named_parameters(recurse=recurse):
        yield from plain_tensors(name, parameter)


def plain_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """As `plain_parameters`, for one tensor of this name."""
    if is_traceable_wrapper_subclass(tensor):
        inner = ((part, getattr(tensor, part)) for part in tensor.__tensor_flatten__()[0])
        yield from ((f"{name}.{part}", value) for part, value in inner if isinstance(value, Tensor))
    else:
        yield name, tensor
