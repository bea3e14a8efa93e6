"""Advice on the learning rate: one line before the first step, if the rate is far from all that work."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np

from ..config import AUTO
from ..defaults import OF_EPS, scored_eps
from ..normaliser import Curvature
from ..optimizer import number
from ..running import Running

logger = logging.getLogger(__name__)

#: Learning rates between which the best one was found, by the number of elements that move; see `useful_rates`.
SIZES = (1e3, 1e4, 1e5, 1e6, 3e8)
LOW = (3e-3, 5e-4, 1e-4, 5e-5, 1e-7)
HIGH = (3e-1, 6e-2, 3e-3, 2e-3, 1e-6)
#: The largest rate that adapters were trained with, those of prompts and prefixes.
HIGH_ADAPTERS = 1e-2
#: Distance of a step with the best rate, if the method normalises it.
STEP = 0.1, 4.0
#: The largest rate of steps along compared scores, as a multiple of the default: that of examples/black_box.py.
SCORED = 50.0
#: For steps that are normalised by the curvature.
NEWTON = 0.05, 1.0
#: For scales that move by fractions of themselves.
SCALES = 3e-4, 2.0
#: By these factors outside of the range a rate is worth a line. Runs end soon above it, and only take longer below.
ABOVE, BELOW = 10.0, 30.0


def useful_rates(engine: Running) -> tuple[float, float] | None:
    """Learning rates between which the best one of a run will be; None if that is not known.

    This is the only place for such numbers. They were measured, or are from the papers of the methods:

    * Plain SPSA with one direction, by the number of elements that move: 386 and 650: 2e-2 and 2.5e-1 (linear heads);
      866, 1,728 and 12,288: 1.6e-2, 3.9e-3 and 4.6e-2 (LoRA); 9,500 to 10,000: 9.8e-4 (a transformer), 4.9e-4 (a
      convolutional network) and 1.6e-2 (an MLP); 35,000: 9.8e-4 (BERT) and 2.4e-4 (Llama); 830,000: 1.8e-3, or half of
      it for longer runs (BERT); 6.5 million: 5e-5 to 1e-4 (LoRA on OPT-13B); 350 million: 1e-6 (RoBERTa-large); 13
      billion: 1e-7 to 1e-6 (OPT-13B). Those beyond a million are from MeZO (arXiv 2305.17333). `LOW` and `HIGH` enclose
      all of these, with straight lines in logarithms between the sizes. Prefix tuning of large models takes 1e-3 to
      1e-2 for two million elements, hence the wider range where few of the weights move.
    * Steps of a normalised length: the best rates of FZOO with 8 directions, 4e-3 to 6e-2 for 9,610 to 35,000 elements
      and 5e-5 for 1.3 billion (arXiv 2506.09034), are a distance ``lr * sqrt(elements / directions)`` of 0.3 to 2.3.
      Where scores are compared, eps says how far weights may move: the published rate (arXiv 2509.24372) is the least.
    * Steps that are normalised by the curvature: 0.25 to 0.5 for 650 to 830,000 elements; no unit is left in the rate.
    * Relative scales of nf4: 1e-1 for a model of 246,240 weights, and 1.2 for 13,824 scales. A move by lr * g of a
      weight's own size w corresponds to an absolute rate of lr * w²: MeZO's 1e-6 on weights of 0.02 to 2.5e-3.

    The best rate grows with the number of directions, and momentum multiplies a step by 1 / (1 - beta).
    """
    # Of other rules and of absolute scales too little is known; a torch optimizer's rates are those of backpropagation.
    scalings = [slot.scaling for slot in engine.slots if slot.scaling is not None]
    if engine.rule.name not in ("sgd", "momentum") or not all(scaling.relative for scaling in scalings):
        return None
    moved = sum(slot.shape.numel() for slot in engine.slots)
    directions = engine.num_probes
    if 8 * directions > moved:  # the estimate is nearly the gradient, and its largest curvature decides
        return None
    factor = directions * (1.0 - getattr(engine.rule, "beta", 0.0))
    if isinstance(engine.normaliser, Curvature):
        low, high = NEWTON
    elif engine.normaliser is not None or engine.estimator.scale_free:
        low, high = (distance / math.sqrt(directions * moved) for distance in STEP)
        named = None if engine.normaliser is None else engine.normaliser.name
        eps = number(_groups(engine)[0], "eps", 0.0)
        least = OF_EPS * scored_eps(engine.estimator, engine.rule, named, eps, engine.config.maximize)
        low, high = max(low, least), max(high, SCORED * least)
    elif engine.estimator.name == "spsa":
        low, high = SCALES if scalings else _plain(moved, sum(p.numel() for p in engine.model.parameters()))
    else:
        return None
    return low * factor, high * factor


def _groups(engine: Running) -> list[dict[str, Any]]:
    return getattr(engine.optimizer, "inner", engine.optimizer).param_groups


def _plain(moved: int, total: int) -> tuple[float, float]:
    """The range for plain SPSA with one direction, where ``moved`` of ``total`` weights move."""
    low, high = (float(np.exp(np.interp(np.log(moved), np.log(SIZES), np.log(rates)))) for rates in (LOW, HIGH))
    return low, max(high, HIGH_ADAPTERS) if moved < 0.1 * total else high


def lr_advice(engine: Running) -> str | None:
    """One line if the learning rate that the user has chosen is far from all that work, else None."""
    lr = max(number(group, "initial_lr", number(group, "lr", 0.0)) for group in _groups(engine))
    range_ = useful_rates(engine)
    if range_ is None or lr == 0.0 or engine.config.lr == AUTO or engine.step_count:
        return None
    low, high = range_
    if low / BELOW <= lr <= high * ABOVE:
        return None
    front = engine.continuity.front
    what = "scales" if any(slot.scaling is not None for slot in engine.slots) else "weights"
    moved = sum(slot.shape.numel() for slot in engine.slots)
    where, so = ("below", "hardly anything will be learnt") if lr < low else ("above", "the loss is likely to grow")
    return (
        f"{front.names.get('lr', 'lr')}={lr:g} is far {where} the rates that work for {moved:,} {what} with "
        f"{engine.estimator.name}, so {so}; write one of {low:.0e} to {high:.0e}, or {front.without_lr}"
    )


def advise(engine: Running) -> None:
    """Logs the advice on the learning rate, if there is any."""
    advice = lr_advice(engine)
    if advice is not None:
        logger.warning("%s", advice)
