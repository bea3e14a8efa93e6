"""The learning rate and eps where none were given."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn

from .estimators import Estimator
from .normaliser import CURVATURE, Curvature, Normaliser
from .rules import Momentum, UpdateRule
from .targets import Slot, parts_of

#: The rate of steps that are normalised by the curvature, as a fraction of Newton's step along a direction.
NEWTON = 0.25
#: What is left of the default rate where trials have shown more noise than decrease.
NOISY = 0.25
#: How far other steps move all weights together, for each direction: root mean square of an element times the square
#: root of their number.
DISTANCE = 0.06
#: The most directions that the default rate grows with: with more of them the estimate is nearly the gradient, and the
#: largest curvature decides, however many there are.
GROWS_UP_TO = 30
#: The least that steps along compared scores move an element, for each direction, as a share of eps: half of it with
#: 30 of them, as published for language models (arXiv 2509.24372: 5e-4 and 1e-3).
OF_EPS = 1 / 60
#: The least default eps where the curvature is measured.
CURVED = 1e-3
#: By part of a parameter's name, how much larger than for full weights the distance of the probes is for adapters
#: (MeZO, arXiv 2305.17333, table 15): LoRA, and the embeddings of prefix and prompt tuning.
WIDER = {"prompt_encoder": 100.0, "lora_": 10.0}
#: The same for scales: with a shorter distance the curvature of the loss along them is lost in rounding.
WIDER_SCALES = 10.0


def default_lr(
    slots: Iterable[Slot],
    rule: UpdateRule,
    normaliser: str | None,
    num_probes: int = 1,
    share: float = 1.0,
    apart: float = 0.0,
) -> float:
    """The learning rate where none was given.

    Normalised by the curvature, it is the same for every model, size, task and method; docs/learning-rate.md has the
    measurements. Steps whose length does not depend on the loss (signs, normalised gradients, shaped scores) are only
    given a length: moving d elements by ``lr`` each moves the weights by ``lr * sqrt(d)``, whose best value varies
    more between tasks. Both are proportional to the number of directions, up to
    `GROWS_UP_TO`, since the error of their mean is smaller.

    A score comes in jumps, so that eps has to be as far as the weights move before it changes. Steps that follow a
    comparison of scores may then be a part of eps, if that is more; see `scored_eps`.

    Args:
        slots: what moves.
        rule: the update rule; momentum adds up ``1 / (1 - beta)`` steps.
        normaliser: name of the normaliser; None for none.
        num_probes: directions per step.
        share: the share of the elements that a direction moves.
        apart: what `scored_eps` returns.
    """
    rate = NEWTON if normaliser == CURVATURE else max(DISTANCE / math.sqrt(moving(slots, share)), OF_EPS * apart)
    return rate * min(num_probes, GROWS_UP_TO) * (1.0 - rule.beta if isinstance(rule, Momentum) else 1.0)


def scored_eps(estimator: Estimator, rule: UpdateRule, normaliser: str | None, eps: float, maximize: bool) -> float:
    """The ``eps`` of a method whose steps are as long as the comparison of scores says, whatever these are; else 0."""
    compared = estimator.compares and estimator.scale_free and not rule.scale_free
    return eps if maximize and compared and normaliser is None else 0.0


def moving(slots: Iterable[Slot], share: float = 1.0) -> float:
    """Number of elements that a direction moves on average."""
    return max(1.0, sum(slot.shape.numel() for slot in slots) * share)


def said_default(slots: Iterable[Slot], lr: float, eps: float, normaliser: Normaliser | None) -> str:
    """The line of log for a rate that was not given, with the eps that goes with it.

    Args:
        slots: what moves.
        lr: the rate that schedules start from; that of the first step is 0 if they begin with a warm-up.
        eps: the distance of the probes.
        normaliser: that of the run.
    """
    if isinstance(normaliser, Curvature):
        why = f"steps are normalised by the curvature that they measure, with a rate of {lr:.2g}"
    else:
        count = sum(slot.shape.numel() for slot in slots)
        why = f"it is {lr:.2g}, a length of step for the {count:,} weights that move"
    return f"no learning rate was given: {why}, and probes are at eps={eps:g}; lr='auto' searches for one by trial runs"


def default_eps(estimator: Estimator, model: nn.Module, slots: Iterable[Slot], normaliser: str | None = None) -> float:
    """The estimator's eps, made wider for adapters and for scales that move by a fraction of their value.

    Where the curvature is measured it is at least `CURVED`: that divides the rounding of losses by eps squared.
    """
    kept = [slot for slot in slots if "eps" not in slot.own]
    own = {id(tensor) for slot in kept for tensor in slot.tensors}
    names = [name for name, held, _ in parts_of(model.named_parameters()) if id(held) in own]
    factors = [factor for part, factor in WIDER.items() if any(part in name for name in names)]
    if any(slot.scaling is not None and slot.scaling.relative for slot in kept):
        factors.append(WIDER_SCALES)
    least = CURVED if normaliser == CURVATURE else 0.0
    return max(estimator.default_eps, least) * max(factors, default=1.0)
