"""The ordinary target: parameters that require a gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..errors import ModelError
from .base import TARGETS, Slot, Target, check_tensor, memory_of, slot_keys


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
        return [Slot(key, slot.tensors, slot.modules) for key, (_, slot) in zip(keys, found, strict=True)]


def trainable_slots(model: nn.Module) -> list[tuple[str, Slot]]:
    """A slot for each memory that a parameter with ``requires_grad`` shows, with the full name of its first.

    Raises:
        ModelError: a parameter cannot be moved.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for name, parameter in named:
        check_tensor(name, parameter)
    groups: dict[tuple[object, ...], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in named:
        groups.setdefault(memory_of(parameter), []).append((name, parameter))
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for owned in module.parameters(recurse=False):
            owners.setdefault(id(owned), []).append(module)
    return [
        (
            members[0][0],
            Slot(
                members[0][0],
                tuple(p for _, p in members),
                tuple(module for _, p in members for module in owners[id(p)]),
            ),
        )
        for members in groups.values()
    ]
