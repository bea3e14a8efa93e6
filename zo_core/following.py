"""An engine that continues with something new: other weights that move, or a new run."""

from __future__ import annotations

import logging
import operator

from torch import Tensor, nn

from .checkpoint import next_seed
from .defaults import moving
from .normaliser import normaliser_of
from .running import Running
from .targets import as_it_lies, held

logger = logging.getLogger(__name__)


@as_it_lies
def trainable(model: nn.Module) -> list[Tensor]:
    """The parameters that require a gradient at the moment; of DTensors, what this process holds."""
    return [held(parameter) for parameter in model.parameters() if parameter.requires_grad]


def follow_model(engine: Running) -> None:
    """Makes an engine train the weights that are trainable now; some may have been frozen, unfrozen, added or replaced.

    Scales that a move of the model has replaced are put back into their layers.

    Raises:
        ModelError: no trainable weight is left.
    """
    engine.target.relink(engine.slots)
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
    old_slots, written = engine.slots, engine.written
    engine.take(slots)
    engine.written = written
    engine.optimizer.take_thresholds(dict(engine.optimizer.thresholds), old_slots, engine.slots)
    engine.optimizer.state.update(kept)
    engine.store_state()
    engine.braking.history.forget(engine.step_count)
    _normalise_anew(engine)  # what it has measured is of other weights
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


def begin_again(engine: Running) -> None:
    """Starts a new run at step 0, on weights that this engine has moved.

    It draws directions of its own. All other state is reset as well, so that its log replays on the weights that
    it started from; only a torch optimizer keeps its state.
    """
    continuity = engine.continuity
    if not engine.step_count and not continuity.ahead:
        return
    engine.discard()
    engine.updaters.settle()
    engine.flush()
    engine.optimizer.thresholds.clear()
    if not engine.rule.wants_optimizer:
        for state in engine.optimizer.state.values():
            state.clear()
        engine.store_state()
    engine.at(0, next_seed(engine.seed))
    engine.braking.reset()
    if engine.backprop is not None:
        engine.backprop.reset()
    engine.optimizer.factor = 1.0
    _normalise_anew(engine)
    continuity.ahead = 0
    engine.merged, continuity.whole = False, True


def _normalise_anew(engine: Running) -> None:
    if engine.normaliser is not None:
        size, two_sided = moving(engine.slots, engine.noise.share), engine.estimator.two_sided
        engine.normaliser = normaliser_of(engine.normaliser.name, size, two_sided=two_sided)


def take_over(engine: Running, before: Running) -> None:
    """Continues the run of another engine with the same optimizer, which holds other tensors now.

    Args:
        engine: the new engine, which has measured nothing yet.
        before: the earlier engine, which is closed. Its listeners are called for later steps.
    """
    engine.listeners = before.listeners
    engine.at(engine.step_count, before.seed)
    engine.continuity.given["rule"] = before.continuity.given["rule"]  # a scheduler may have cycled its momentum
    engine.optimizer.state.update(before.optimizer.state)
    engine.optimizer.take_thresholds(before.optimizer.thresholds, before.slots, engine.slots)
    engine.optimizer.factor = before.optimizer.factor
    if engine.backprop is not None and before.backprop is not None:
        engine.backprop.take_over(before.backprop)
    engine.braking = before.braking
    engine.braking.history.forget(before.step_count)
    engine.store_state()
