"""Follows changes to the model during a run: weights that are frozen, unfrozen, replaced or added."""

from __future__ import annotations

import logging
import operator
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from .engine import ZeroOrder

logger = logging.getLogger(__name__)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require a gradient at the moment."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def follow_model(engine: ZeroOrder) -> None:
    """Makes an engine train the weights that are trainable now; some may have been frozen, unfrozen, added or replaced.

    Raises:
        ModelError: no trainable weight is left.
    """
    now = trainable(engine.model)
    if len(now) == len(engine.trainable) and all(map(operator.is_, now, engine.trainable)):
        return
    before = {id(tensor): slot.key for slot in engine.slots for tensor in slot.tensors}
    engine.updaters.settle()
    engine.stop()
    engine.places.bring_back()
    kept = {tensor: dict(state) for tensor, state in engine.optimizer.state.items()}
    slots = engine.choose()
    engine.regroup(slots)
    old_slots = engine.slots
    engine.take(slots)
    engine.optimizer.take_thresholds(dict(engine.optimizer.thresholds), old_slots, engine.slots)
    engine.optimizer.state.update(kept)
    engine.store_state()
    after = {id(tensor): slot.key for slot in engine.slots for tensor in slot.tensors}
    outside = [slot.key for slot in slots if not any(id(tensor) in after for tensor in slot.tensors)]
    logger.warning(
        "the model's trainable weights have changed since the last step: %s",
        "; ".join(
            f"{words} ({len(names)}): {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
            for words, names in (
                ("no longer trained", [key for i, key in before.items() if i not in after]),
                ("trained from now on", [key for i, key in after.items() if i not in before]),
                ("trainable, but not in the optimizer", outside),
            )
            if names
        ),
    )
    for follower in engine.followers:
        follower()
