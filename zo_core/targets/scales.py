"""Common code of all targets of quantisation scales: settings, and how scales become slots. QZO, arXiv 2505.13430."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn

from ..noise.direction import Scaling
from .base import Slot, Target, check_tensor, slot_keys
from .trainable import trainable_slots


@dataclass(frozen=True)
class Scales(Target):
    """The scales of quantised layers; their codes never change. A subclass finds them.

    Attributes:
        relative: probe ``scale * (1 + eps * z)`` and update by ``scale * (1 - lr * g * z)``, so that one
            eps fits all layers; False moves by ``eps * z`` itself, as the paper does.
        floor: minimum of a scale, in probes and updates.
        others: trainable unquantised parameters (norms, embeddings, biases, adapters) move too.
        others_lr: their learning rate; None takes that of the scales.
        others_eps: their eps; None takes that of the scales.
    """

    default_clip: ClassVar[float] = 100.0
    of_quantised: ClassVar[bool] = True
    relative: bool = True
    floor: float = 1e-7
    others: bool = False
    others_lr: float | None = None
    others_eps: float | None = None

    def __post_init__(self) -> None:
        problems = []
        for name in ("relative", "others"):
            if not isinstance(getattr(self, name), bool):
                problems.append(f"{name}={getattr(self, name)!r} must be True or False")
        if not _number(self.floor) or self.floor < 0:
            problems.append(f"floor={self.floor!r} must be a number of at least 0, for example 1e-7")
        for name, least in (("others_lr", "of at least 0"), ("others_eps", "above 0")):
            value = getattr(self, name)
            if value is None:
                continue
            if not _number(value) or value < 0 or (value == 0 and name == "others_eps"):
                problems.append(f"{name}={value!r} must be a number {least}, or None for that of the scales")
            elif not self.others:
                problems.append(f"{name}={value!r} has no use with others=False; write others=True")
        if problems:
            raise ValueError(f"target {self.name!r}: " + "; ".join(problems))

    def as_slots(self, model: nn.Module, found: Iterable[tuple[str, Tensor, nn.Module]]) -> list[Slot]:
        """A slot for each scale tensor, and for each other parameter that moves.

        Args:
            model: has the other parameters.
            found: name of a scale tensor, the tensor itself, and the module whose forward reads it. A tensor
                may occur more than once.
        """
        scales: dict[int, tuple[str, Tensor, list[nn.Module]]] = {}
        for name, tensor, module in found:
            check_tensor(name, tensor)
            scales.setdefault(id(tensor), (name, tensor, []))[2].append(module)
        others = trainable_slots(model) if self.others else []
        # One call for all keys, because the prefix that is removed depends on all names.
        keys = slot_keys([*(name for name, _, _ in scales.values()), *(name for name, _ in others)])
        scaling = Scaling(self.relative, self.floor)
        result = [
            Slot(key, (tensor,), tuple(modules), scaling)
            for key, (_, tensor, modules) in zip(keys, scales.values(), strict=False)
        ]
        own = {"lr": self.others_lr, "eps": self.others_eps}
        given = {name: value for name, value in own.items() if value is not None}
        for key, (_, slot) in zip(keys[len(scales) :], others, strict=True):
            result.append(replace(slot, key=key, own=given))
        return result


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
