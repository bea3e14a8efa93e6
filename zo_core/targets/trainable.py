"""The ordinary target: parameters that require a gradient."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn

from ..errors import ModelError
from ..noise.parts import Part
from .base import TARGETS, Slot, Target, check_tensor, plain_parameters, slot_keys
from .dispatched import check_values
from .memory import Chart, Extent, Region, as_it_lies, extent, neighbours
from .sharded import held_part

logger = logging.getLogger(__name__)

Named = tuple[str, Tensor]


@dataclass(frozen=True, eq=False)
class Other:
    """A tensor that a module holds: a parameter, a buffer, or an attribute."""

    kind: str
    name: str
    tensor: Tensor


@TARGETS.register
@dataclass(frozen=True)
class Trainable(Target):
    """Every parameter with ``requires_grad``: all weights of a plain model, the adapters of a PEFT model."""

    name: ClassVar[str] = "trainable"

    def slots(self, model: nn.Module) -> list[Slot]:
        found = trainable_slots(model)
        if not found:
            raise ModelError(
                "model has no trainable parameter; call requires_grad_(True) on the parameters that should move "
                "(a quantised model needs PEFT adapters, for example get_peft_model(model, LoraConfig(...)))"
            )
        keys = slot_keys(name for name, _ in found)
        return [replace(slot, key=key) for key, (_, slot) in zip(keys, found, strict=True)]


@as_it_lies
def trainable_slots(model: nn.Module) -> list[tuple[str, Slot]]:
    """A slot for each piece of memory that a parameter with ``requires_grad`` views, with its first full name.

    Other tensors that view that memory (frozen parameters, buffers, attributes of a module) belong to the slot, too:
    they move with it, so a probe has to perturb them.

    Raises:
        ModelError: a parameter cannot be moved, or shares a part of its memory with another one that moves.
    """
    check_values(model)
    groups: dict[Hashable, list[Named]] = {}
    parts: dict[int, Part | None] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensor, part = held_part(name, parameter)
            check_tensor(name, tensor)
            groups.setdefault(extent(tensor) or id(tensor), []).append((name, tensor))
            parts[id(tensor)] = part
    moving = {id(parameter) for members in groups.values() for _, parameter in members}
    owners: dict[int, list[nn.Module]] = {}
    others: dict[int, Other] = {}
    for other, module in held_tensors(model):
        owners.setdefault(id(other.tensor), []).append(module)
        if id(other.tensor) not in moving:
            others.setdefault(id(other.tensor), other)
    joined = followers(groups, others.values())
    found = [(members[0][0], _slot(members, joined.get(key, []), owners)) for key, members in groups.items()]
    return [(name, replace(slot, part=parts[id(slot.tensor)])) for name, slot in found]


def _slot(members: list[Named], others: list[Tensor], owners: dict[int, list[nn.Module]]) -> Slot:
    """The slot of parameters that view the same elements, and of other tensors that view some of them."""
    lead = members[0][1]
    first = [p for _, p in members if p.shape == lead.shape and p.stride() == lead.stride()]
    known = set(map(id, first))
    tensors = (*first, *(p for _, p in members if id(p) not in known), *others)
    modules = tuple(module for tensor in tensors for module in owners[id(tensor)])
    return Slot(members[0][0], tensors, modules, region=Region.of(tensors, len(first)))


def held_tensors(model: nn.Module) -> Iterator[tuple[Other, nn.Module]]:
    """All tensors that modules hold as parameters, buffers or attributes, each with its module."""
    for prefix, module in model.named_modules():
        attributes = [(name, value) for name, value in vars(module).items() if isinstance(value, Tensor)]
        kinds = {
            "parameter": plain_parameters(module, recurse=False),
            "buffer": module.named_buffers(recurse=False),
            "attribute": attributes,
        }
        for kind, named in kinds.items():
            for name, tensor in named:
                yield Other(kind, f"{prefix}.{name}".lstrip("."), tensor), module


def followers(groups: Mapping[Hashable, Sequence[Named]], others: Iterable[Other]) -> dict[Hashable, list[Tensor]]:
    """Those of ``others`` that view some of the memory of a group, by group.

    Args:
        groups: groups of parameters that view the same elements, by their `Extent`.
        others: tensors that do not move by themselves.

    Raises:
        ModelError: two groups have elements in common, or one of ``others`` views parts of two, or as another dtype.
    """
    order = {key: index for index, key in enumerate(groups)}
    placed: list[tuple[Extent | Other, Extent]] = [(key, key) for key in groups if isinstance(key, Extent)]
    placed += [(other, where) for other in others if (where := extent(other.tensor)) is not None]
    joined: dict[Hashable, list[Tensor]] = {}
    for cluster in neighbours(placed):
        slots = sorted((key for key, _ in cluster if isinstance(key, Extent)), key=order.__getitem__)
        if not slots:
            continue
        chart = Chart([where for _, where in cluster])
        for index, slot in enumerate(slots):
            for before in chart.met(slot):
                raise ModelError(_in_common(groups[slots[before]][0][0], groups[slot][0][0]))
            chart.mark(slot, index)
        for key, where in cluster:
            if isinstance(key, Extent):
                continue
            met = [slots[index] for index in chart.met(where)]
            if len(met) == 1 and _is_view(key.tensor, groups[met[0]][0][1]):
                joined.setdefault(met[0], []).append(key.tensor)
            elif met:
                _refuse(key, [groups[slot][0][0] for slot in met])
    return joined


def _is_view(tensor: Tensor, lead: Tensor) -> bool:
    """Whether a tensor can be expressed as a view of a parameter's storage."""
    storage, where = lead.untyped_storage(), extent(tensor)
    assert where is not None
    inside = storage.data_ptr() <= where.begin and where.end <= storage.data_ptr() + storage.nbytes()
    return inside and tensor.dtype == lead.dtype and (where.begin - lead.data_ptr()) % lead.element_size() == 0


def _in_common(one: str, other: str) -> str:
    return (
        f"the trainable parameters {one!r} and {other!r} have a part of their memory in common, which a step would "
        f"move twice, along different directions; requires_grad_(False) on one of them leaves it to the other, and "
        "nn.Parameter(parameter.detach().clone()) gives one memory of its own"
    )


def _refuse(other: Other, names: list[str]) -> None:
    """Raises `ModelError`; only warns for an attribute, which may just be the memory that parameters were cut from."""
    those = " and ".join(map(repr, names[:2])) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
    if other.kind == "attribute":
        logger.warning(
            "attribute %r is a view of parameters that move (%s); a forward that reads it sees them unperturbed",
            other.name,
            those,
        )
        return
    raise ModelError(
        f"{other.kind} {other.name!r} shares a part of its memory with {those}, so a probe cannot perturb "
        "one and leave the other as it is; give it memory of its own with tensor.clone(), or "
        f"requires_grad_(False) on {those}"
    )
