"""Going back: what an engine does when its brake raises an alarm, or when the log of a run says that it did."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch

from .brake import SHRUNK, SHRUNK_16, Alarm, Done
from .directions import Directions
from .errors import StateError
from .normaliser import Curvature
from .records import Probe, Rollback
from .rules import RuleMove
from .running import Running
from .targets import Slot

logger = logging.getLogger(__name__)


class Reverting(Running, Protocol):
    """An engine whose updates can be reverted."""

    directions: Directions


def braked(
    engine: Reverting, loss: float | None, losses: Sequence[float], worse: Alarm | None = None
) -> Rollback | None:
    """Passes the loss of the step that was measured to the brake, and goes back or takes shorter steps if it says so.

    Args:
        engine: the engine, before the update of the step.
        loss: mean loss of the step; None if a query failed.
        losses: losses of its probes.
        worse: that the run ends worse than it began, if it is its last step.

    Returns:
        What was done; None if the step is to be applied.
    """
    braking, step, said = engine.braking, engine.step_count, engine.continuity.front.said
    braking.noted(losses)
    alarm = _see(engine, loss)
    if worse is not None:
        return _ended(engine, worse)
    if alarm is None:
        return None
    if alarm.anew:
        logger.warning(
            "%s, as it was after going back to these weights: it is another loss now. The brake begins anew, and the "
            "learning rate stays",
            alarm.said(step),
        )
        return None
    if braking.mode == "warn":
        lowers = "halves it" if braking.share(alarm) == 0.5 else "takes a quarter of it"
        back = "" if engine.backprop is not None else f"; {said({'brake': 'rollback'})} goes back and {lowers}"
        braking.warn(step, alarm, f"take a lower learning rate{back}")
        return None
    if not engine.rule.undoable:
        braking.warn(step, alarm, f"the updates of the rule {engine.rule.name!r} cannot be reverted: take a lower rate")
        return None
    goal = max(engine.exchange.everywhere(braking.goal(alarm)))  # only one process writes a log, whose start limits it
    rollback = Rollback(goal, engine.optimizer.factor * braking.share(alarm))
    logger.warning(
        "%s; the weights %s, and from here on the learning rate is %.4g of what is set",
        alarm.said(step),
        "stay" if rollback.to == step else f"go back to those before step {rollback.to}",
        rollback.factor,
    )
    roll_back(engine, rollback)
    braking.returned = rollback.to == alarm.step
    return rollback


def _ended(engine: Reverting, worse: Alarm) -> Rollback | None:
    """Goes back from the last step of a run that ends worse than it began: to its best block, or to its beginning."""
    braking, step = engine.braking, engine.step_count
    best = braking.learnt()
    goal = max(engine.exchange.everywhere(max(best, braking.history.floor, braking.logged_from)))
    why = ""
    if braking.mode == "warn":
        back = "" if not engine.rule.undoable else f"; {engine.continuity.front.said({'brake': 'rollback'})} goes back"
        why = f"{back}. Take a lower learning rate"
    elif not engine.rule.undoable:
        why = f"; the updates of the rule {engine.rule.name!r} cannot be reverted. Take a lower learning rate"
    elif goal > best:
        why = f"; the weights stay, as the updates are known from step {goal} on. Take a lower learning rate"
    if why:
        logger.warning("%s%s", worse.said(step), why)
        return None
    rollback = Rollback(goal, engine.optimizer.factor * 0.5)
    logger.warning("%s; the weights go back to those before step %d", worse.said(step), goal)
    braking.restart(step + 1)
    roll_back(engine, rollback)
    return rollback


def repeated(engine: Reverting, loss: float | None, rollback: Rollback | None) -> None:
    """Does for a step of the log what `braked` did when it was measured; for a skipped step, too.

    Raises:
        StateError: the step went back, and the updates since then are not known.
    """
    alarm = _see(engine, loss)
    if rollback is None:
        return
    if alarm is None:
        engine.braking.restart(engine.step_count + 1)
    roll_back(engine, rollback)
    engine.braking.returned = alarm is not None and rollback.to == alarm.step


def _see(engine: Reverting, loss: float | None) -> Alarm | None:
    normaliser, braking = engine.normaliser, engine.braking
    braking.normaliser = None if normaliser is None else (normaliser.mean_square, normaliser.count)
    return braking.see(engine.step_count, loss)


def roll_back(engine: Reverting, rollback: Rollback) -> None:
    """Reverts the updates since a step, in the weights unless these are already those of a later step.

    The step normaliser also goes back: what it has seen of an explosion would make all later steps tiny.
    """
    history = engine.braking.history
    if rollback.to < history.floor:
        raise StateError(
            f"step {engine.step_count} of the run went back to step {rollback.to}, and the updates are known from step "
            f"{history.floor} on; resume from an earlier checkpoint, or from the beginning of the log"
        )
    steps = history.pop(rollback.to, engine.noise.seed)
    if steps and steps[0].normaliser is not None and engine.normaliser is not None:
        engine.normaliser.mean_square, engine.normaliser.count = steps[0].normaliser
    if engine.step_count < engine.continuity.ahead:
        return
    engine.merged = engine.updaters.settle() or engine.merged
    groups = engine.optimizer.param_groups
    index = {id(group): place for place, group in enumerate(groups)}
    with torch.no_grad(), engine.hidden():
        for slot, group in engine.optimizer.groups_of(engine.slots).items():
            undo(engine, slot, index[id(group)], steps)
    torch.clear_autocast_cache()


def undo(engine: Reverting, slot: Slot, group: int, steps: Sequence[Done]) -> None:
    """Reverts steps in one slot, whose windows have ended.

    Args:
        engine: the engine.
        slot: one of its slots.
        group: index of the slot's group in the steps.
        steps: oldest first.
    """
    if steps:
        engine.updaters.of[slot].undo(partial(moves_of, engine.directions, slot, group, steps))


def moves_of(directions: Directions, slot: Slot, group: int, steps: Sequence[Done]) -> list[RuleMove]:
    """The updates of a slot in some steps, without those that did not move it."""
    moves: list[RuleMove] = []
    for done in steps:
        how = done.eps[group], done.lrs[group], done.weight_decay[group]
        _, direction, lr, weight_decay = directions.move(slot, done.probes, *how)
        if not direction.still:
            moves.append((done.rule, direction, lr, weight_decay))
    return moves


def note(engine: Reverting, probes: tuple[Probe, ...]) -> None:
    """Called at the end of every step: keeps its update, so that it can be reverted, and what it costs."""
    history, step = engine.braking.history, engine.step_count
    if not probes:
        return
    lrs = tuple(engine.directions.rates())
    engine.braking.trust.paid(_cost(engine, probes, min(lrs)))
    if not engine.rule.undoable:
        history.forget(step + 1)
        return
    eps = tuple(engine.directions.relative_eps(group) for group in engine.optimizer.param_groups)
    weight_decay = tuple(engine.directions.decays())
    narrow = any(weight_decay) and any(slot.tensor.element_size() < 4 for slot in engine.slots)
    done = Done(step, probes, lrs, eps, weight_decay, engine.rule, engine.braking.normaliser)
    history.add(done, engine.seed, SHRUNK_16 if narrow else SHRUNK)


def _cost(engine: Reverting, probes: tuple[Probe, ...], lr: float) -> float:
    """By how much the curvature along a step raises the loss; 0 if it is not measured, or the rule's step not known.

    The smallest rate of all groups is taken, so the cost is never too high.
    """
    if not isinstance(engine.normaliser, Curvature) or engine.rule.reach is None:
        return 0.0
    lengths = [lr * engine.rule.reach * probe.coefficient for probe in probes]
    return 0.5 * engine.normaliser.scale * sum(length * length for length in lengths)
