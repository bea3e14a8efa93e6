"""The learning rate and eps where none were given."""

from __future__ import annotations

import math
from collections.abc import Iterable

from .estimators import Estimator
from .rules import Momentum, UpdateRule
from .targets import Slot

#: How far a normalised step moves all weights together, for each direction: root mean square of an element times the
#: square root of their number.
DISTANCE = 1.0
#: As `DISTANCE`, in units of the weights themselves, for scales that move by a fraction of their value.
RELATIVE = 1e-2
#: By part of a parameter's name, how much larger than for full weights the distance of the probes is for adapters
#: (MeZO, arXiv 2305.17333, table 15): LoRA, and the embeddings of prefix and prompt tuning.
WIDER = {"prompt_encoder": 100.0, "lora_": 10.0}


def default_lr(slots: Iterable[Slot], rule: UpdateRule, num_probes: int = 1, share: float = 1.0) -> float:
    """A learning rate for normalised steps, from the number of elements that move.

    A step that moves d elements by ``lr`` each moves the weights by ``lr * sqrt(d)``. The distance that serves
    best hardly depends on model, size, task and method (docs/learning-rate.md has the measurements), so the rate
    is that distance over ``sqrt(d)``. It is proportional to the number of directions, whose mean has a
    correspondingly smaller length and error.

    Args:
        slots: what moves.
        rule: the update rule; momentum adds up ``1 / (1 - beta)`` steps.
        num_probes: directions per step.
        share: the share of the elements that a direction moves.
    """
    kept = list(slots)
    relative = any(slot.scaling is not None and slot.scaling.relative for slot in kept)
    rate = RELATIVE if relative else length_rate(sum(slot.tensor.numel() for slot in kept) * share)
    return rate * num_probes * (1.0 - rule.beta if isinstance(rule, Momentum) else 1.0)


def length_rate(count: float) -> float:
    """The rate with which a step over ``count`` elements has the default length."""
    return DISTANCE / math.sqrt(max(1.0, count))


def said_default(slots: Iterable[Slot], lr: float) -> str:
    """The line of log for a rate that was not given."""
    count = sum(slot.tensor.numel() for slot in slots)
    return (
        f"no learning rate was given: steps are normalised, and their rate is {lr:.2g}, which suits the {count:,} "
        "weights that move; lr='auto' searches for a better one"
    )


def default_eps(estimator: Estimator, slots: Iterable[Slot]) -> float:
    """The estimator's eps, made wider for adapters."""
    keys = [slot.key for slot in slots]
    factors = [factor for name, factor in WIDER.items() if any(name in key for key in keys)]
    return estimator.default_eps * (factors[0] if factors else 1.0)
