"""The default target: what a user of this model most likely wants to train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from .base import TARGETS, Slot, Target
from .int4 import Int4Scales, has_quantised_layers
from .torchao import TorchaoScales, has_torchao_weights
from .trainable import Trainable


@TARGETS.register
@dataclass(frozen=True)
class Auto(Target):
    """``int4_scales`` or ``torchao_scales`` for a quantised model without trainable adapters, else ``trainable``."""

    name: ClassVar[str] = "auto"

    def chosen(self, model: nn.Module) -> Target:
        if has_adapters(model):
            return Trainable()
        if has_quantised_layers(model):
            return Int4Scales()  # which refuses 8-bit layers
        return TorchaoScales() if has_torchao_weights(model) else Trainable()

    def slots(self, model: nn.Module) -> list[Slot]:
        return self.chosen(model).slots(model)


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT has added adapters to the model, and some parameter is trainable."""
    configured = any(getattr(module, "peft_config", None) for module in model.modules())
    return configured and any(parameter.requires_grad for parameter in model.parameters())
