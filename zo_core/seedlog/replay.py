"""Repeats the steps of a log, many in one pass over each slot.

An update depends only on the slot's own weights and state. So slots do not move together, step by step:
each slot (on the CPU each piece of it that fits into the cache) takes all its steps at once.
A streamed block is read and written once for any number of steps.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from dataclasses import replace as changed
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..brake import Done
from ..config import ZOConfig
from ..engine import ZeroOrder
from ..errors import ModelError, StateError
from ..noise import Direction
from ..noise.direction import piece_size
from ..noise.hashing import BATCH_WORDS
from ..optimizer import ZOOptimizer
from ..progress import Bar
from ..rules import RULES, RuleMove, UpdateRule
from ..targets import TARGETS, WRAPPERS, Slot, Target, Trainable, group_of
from ..undoing import undo
from ..updates import State
from .format import LoggedStep
from .header import check_run, take_factor
from .log import SeedLog

Advance = Callable[[int], None]

#: Number of directions whose words for one batch fit into the cache of words together.
CACHED_DIRECTIONS = 48


def replay(
    model: nn.Module | ZeroOrder,
    log: SeedLog | str | os.PathLike[str],
    until: int | None = None,
    *,
    progress: bool = True,
    frozen: bool = True,
) -> int:
    """Gives a model the weights of a logged run, bit for bit.

    Args:
        model: the base model, as it was when the log began. Or an engine: one with ``offload`` is
            streamed block by block, and one that was loaded from a checkpoint of the run continues from
            its step. Its state (momentum), step and seed are then also set to those of the run.
        log: the log, or its path.
        until: the step to stop before; None replays all steps of the log.
        progress: show a progress bar, if the error stream is a terminal.
        frozen: also check the parameters that do not move.

    Returns:
        The step that the weights are at.

    Raises:
        StateError: the model or the configuration is another one, the log is damaged, or it does not have the
            steps. The weights are unchanged.
    """
    log = log if isinstance(log, SeedLog) else SeedLog.read(log)
    start = (model.step_count if isinstance(model, ZeroOrder) else 0) or log.first_step
    end = _end(log, start, until)
    engine = model if isinstance(model, ZeroOrder) else engine_for(model, log)
    engine.target.relink(engine.slots)
    check_run(engine, log, start, frozen=frozen)
    _check_rules(engine, log)
    if start == log.first_step and engine.places.used():
        raise StateError("the engine has rule state from other steps, which a replay would use; make a new engine")
    if start == log.first_step:
        engine.optimizer.thresholds.clear()  # the thresholds of this run come from the weights at its start
    if start == log.first_step:
        take_factor(engine, log)
    steps = [entry for entry in log.steps if start <= entry.step < end]
    before = [entry for entry in log.steps if entry.step < start]
    if not log.header.get("windows", True):
        engine.updaters.wait_no_more(engine.rule)
    apply_steps(engine, list(log.header["base"]["slots"]), steps, before=before, progress=progress)
    _follow_normaliser(engine, log, end)
    engine.at(end, steps[-1].settings.seed if steps else None)
    if steps:
        engine.rule = _rule(steps[-1], engine, RULES.describe(engine.rule))
    for entry in steps:
        if entry.rollback is not None:
            engine.optimizer.factor = entry.rollback.factor
    return end


def _check_rules(engine: ZeroOrder, log: SeedLog) -> None:
    """Checks, before anything moves, that all steps have the engine's rule; only its settings may change.

    Raises:
        StateError: a step has another rule, or settings that the rule does not have.
    """
    for entry in {repr(entry.rule): entry for entry in log.steps}.values():
        try:
            rule = _rule(entry, engine, RULES.describe(engine.rule))
            same = type(rule) is type(engine.rule) and rule.anchored == engine.rule.anchored
        except ValueError as error:
            raise StateError(f"the seed log {log.path} has step {entry.step} with {error}") from error
        if not same:
            raise StateError(
                f"the seed log {log.path} has step {entry.step} with the rule {entry.rule!r}, and its run has "
                f"{log.header['rule']!r}; a run cannot change its rule, so this log was not written by one"
            )


def _follow_normaliser(engine: ZeroOrder, log: SeedLog, end: int) -> None:
    """Gives the engine's normaliser the state after the steps before ``end``."""
    state = log.header.get("normaliser")
    if engine.normaliser is None or state is None:
        return
    engine.normaliser.load(state)
    before: list[tuple[int, dict[str, Any]]] = []
    for entry in (entry for entry in log.steps if entry.step < end):
        while entry.rollback is not None and before and before[-1][0] >= entry.rollback.to:
            engine.normaliser.load(before.pop()[1])
        if entry.normaliser is not None and not entry.skipped:
            before.append((entry.step, engine.normaliser.saved()))
            engine.normaliser.repeat(entry.step, entry.normaliser)


def _end(log: SeedLog, start: int, until: int | None) -> int:
    """Returns the step to stop before, after checking that the log has the steps from ``start`` to it."""
    if log.header["limits"]:
        raise StateError(f"the seed log {log.path} cannot be replayed: {'; '.join(log.header['limits'])}")
    if log.corrupt is not None and (until is None or until > log.next_step):
        raise StateError(f"{log.corrupt}; until={log.next_step} or less gives the weights before that")
    if not log.first_step <= start <= log.next_step:
        raise StateError(
            f"the seed log {log.path} goes from step {log.first_step} to {log.next_step}, which does not continue an "
            f"engine at step {start}"
        )
    if until is not None and (not isinstance(until, int) or not start <= until <= log.next_step):
        raise StateError(
            f"until={until!r} is not a step that the seed log {log.path} can give; write a whole number from {start} "
            f"to {log.next_step}"
        )
    return log.next_step if until is None else until


def engine_for(model: nn.Module, log: SeedLog) -> ZeroOrder:
    """Makes an engine over the tensors that a logged run moved, with the configuration of that run.

    Raises:
        ModelError: the model has nothing to move.
    """
    header = log.header
    config = ZOConfig(
        estimator=header["estimator"],
        maximize=header.get("maximize", False),
        target=header["target"],
        noise=header["noise"],
        rule=header["rule"],
        num_probes=header["num_probes"],
        stochastic_rounding=header["stochastic_rounding"],
        normalise=(header.get("normaliser") or {"name": False})["name"],
    )
    if not group_of(model):
        config = config.replace(ranks=None)  # one process may replay while the others do something else
    target = TARGETS.resolve(header["target"])
    with _trainable(model, target, header):
        held = [slot.tensor for slot in target.slots(model) if slot.key in header["base"]["slots"]]
        return ZeroOrder(model, config, optimizer=ZOOptimizer(held) if held else None)


@contextmanager
def _trainable(model: nn.Module, target: Target, header: dict[str, Any]) -> Iterator[None]:
    """A context in which only the parameters of the run are trainable; a fresh model may have others trainable."""
    if type(target) is not Trainable:
        yield
        return
    try:
        found = {slot.key for slot in target.slots(model)}
    except ModelError:
        found = set()
    before = {p: p.requires_grad for p in model.parameters()}
    if not found >= header["base"]["slots"].keys():
        mine = moved_names([name for name, _ in model.named_parameters()], header)
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(name in mine)
    try:
        yield
    finally:
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)


def moved_names(names: Iterable[str], header: dict[str, Any]) -> set[str]:
    """Returns the names of the parameters that a run moved, with or without the prefixes that a trainer adds."""
    full = {f"{header['prefix']}{key}" for key in header["base"]["slots"]}
    ends = {end for name in full for end in _ends(name)}
    named = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in names}
    exact = {name for name, plain in named.items() if plain in full}
    longer = {name for name, plain in named.items() if any(end in full for end in _ends(plain))}
    shorter = {name for name, plain in named.items() if plain in ends}
    return exact or longer or shorter


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


@dataclass(frozen=True)
class Part:
    """Consecutive steps that moved the weights.

    Attributes:
        merged: whether low-rank windows ended before them.
        undone: steps that were reverted before them, oldest first.
        steps: the steps.
    """

    merged: bool
    undone: tuple[Done, ...]
    steps: list[LoggedStep] = field(default_factory=list)


def apply_steps(
    engine: ZeroOrder,
    keys: list[str],
    steps: Sequence[LoggedStep],
    *,
    before: Sequence[LoggedStep] = (),
    progress: bool = False,
) -> None:
    """Applies steps to the slots of an engine.

    Args:
        engine: the engine, at the first of the steps.
        keys: keys of the slots, in the order of ``Settings.group_of``.
        steps: the steps, in order.
        before: earlier steps of the run, which these may revert.
        progress: show a progress bar.
    """
    parts = _parts(engine, before, steps)
    position = {key: index for index, key in enumerate(keys)}
    count = sum(len(part.steps) for part in parts)
    bar = Bar(count * sum(slot.tensor.numel() for slot in engine.slots), "replay") if progress else None
    advance: Advance = (lambda amount: None) if bar is None else bar.advance
    with torch.no_grad(), engine.hidden():
        for slot in engine.slots:
            index = position[slot.key]
            updater = engine.updaters.of[slot]
            for part in parts:
                if part.merged or part.undone:
                    updater.settle()
                if part.undone:
                    undo(engine, slot, steps[0].settings.group_of[index], part.undone)
                if updater.windowed:
                    for move in _moves(engine, slot, index, part.steps, advance):
                        updater.update(*move)
                        advance(slot.tensor.numel())
                elif part.steps:
                    work = partial(_advance_slot, engine, slot, index, part.steps, advance)
                    engine.places.move(slot, work)
        engine.flush()
    engine.noise.forget(())
    torch.clear_autocast_cache()
    if bar is not None:
        bar.close()


def _parts(engine: ZeroOrder, before: Iterable[LoggedStep], steps: Iterable[LoggedStep]) -> list[Part]:
    """Splits the steps at the ends of windows and where earlier steps are reverted, without skipped ones."""
    parts, kept = [Part(False, ())], list[LoggedStep]()
    for entry in before:
        _revert(entry, kept)
    for entry in steps:
        undone = _revert(entry, kept)
        if entry.merged or undone:
            rules = RULES.describe(engine.rule)
            parts.append(Part(entry.merged, tuple(_done(engine, step, _rule(step, engine, rules)) for step in undone)))
        if not entry.skipped:
            parts[-1].steps.append(entry)
    return parts


def _revert(entry: LoggedStep, kept: list[LoggedStep]) -> list[LoggedStep]:
    """Adds a step to those that count, or removes from these what it reverts; returns the latter, oldest first."""
    undone = []
    while entry.rollback is not None and kept and kept[-1].step >= entry.rollback.to:
        undone.append(kept.pop())
    if not entry.skipped:
        kept.append(entry)
    return undone[::-1]


def _done(engine: ZeroOrder, entry: LoggedStep, rule: UpdateRule) -> Done:
    return Done(entry.step, entry.probes, entry.lrs, entry.settings.eps, _decays(engine, entry), rule)


def _decays(engine: ZeroOrder, entry: LoggedStep) -> tuple[float, ...]:
    """The weight decay of each group, as a step has applied it."""
    state, decays = entry.normaliser, entry.settings.weight_decay
    factor = 1.0 if engine.normaliser is None or state is None else engine.normaliser.decaying(state)
    return tuple(decay * factor for decay in decays)


def _advance_slot(
    engine: ZeroOrder,
    slot: Slot,
    index: int,
    steps: Sequence[LoggedStep],
    advance: Advance,
    theta: Tensor,
    state: State,
) -> None:
    """Applies steps to one slot."""
    moves = _moves(engine, slot, index, steps, advance)
    plain = (
        slot.scaling is None and slot.part is None and all(type(direction) is Direction for _, direction, _, _ in moves)
    )
    eager = theta.device.type == "cpu" and engine.backend == "eager"
    pieces = eager and plain and moves and theta.numel() >= BATCH_WORDS * moves[0][1].noise.values_per_word
    if pieces and engine.rule.elementwise and engine.num_probes <= CACHED_DIRECTIONS:
        _advance_pieces(engine, moves, advance, theta, state)
        return
    for rule, direction, lr, weight_decay in moves:
        rule.update(theta, state, direction, lr, weight_decay)
        advance(theta.numel())


def _moves(engine: ZeroOrder, slot: Slot, index: int, steps: Sequence[LoggedStep], advance: Advance) -> list[RuleMove]:
    """Returns the moves of a slot; steps that do not move it only advance the progress."""
    moves: list[RuleMove] = []
    own = RULES.describe(engine.rule)
    for entry in steps:
        group = entry.settings.group_of[index]
        settings = entry.settings
        how = settings.eps[group], entry.lrs[group], _decays(engine, entry)[group]
        _, direction, lr, weight_decay = engine.directions.move(slot, entry.probes, *how)
        if direction.still:
            advance(slot.tensor.numel())
            continue
        moves.append((_rule(entry, engine, own), direction, lr, weight_decay))
    return moves


def _rule(entry: LoggedStep, engine: ZeroOrder, own: str | dict[str, Any]) -> UpdateRule:
    """Returns the rule of a step; ``own`` describes the engine's rule."""
    return engine.rule if entry.rule == own else RULES.resolve(entry.rule)


def _advance_pieces(engine: ZeroOrder, moves: list[RuleMove], advance: Advance, theta: Tensor, state: State) -> None:
    """Applies a group of steps to each piece while it is in the cache; words are hashed once for all pieces."""
    flat = theta.reshape(-1)
    noise = moves[0][1].noise
    batch, size = BATCH_WORDS * noise.values_per_word, piece_size(noise)
    group = CACHED_DIRECTIONS // engine.num_probes
    states: dict[int, dict[str, Any]] = {}
    for begin in range(0, flat.numel(), batch):
        for first in range(0, len(moves), group):
            for start in range(begin, min(begin + batch, flat.numel()), size):
                piece = flat[start : start + size]
                if start not in states:
                    states[start] = {name: value.view(-1)[start : start + size] for name, value in state.items()}
                for rule, direction, lr, weight_decay in moves[first : first + group]:
                    rule.update(piece, states[start], changed(direction, offset=start), lr, weight_decay)
                    advance(piece.numel())
    if not state and states and states[0]:
        whole = {name: torch.cat([local[name] for local in states.values()]) for name in states[0]}
        state.update({name: value.view(theta.shape) for name, value in whole.items()})
    if flat.data_ptr() != theta.data_ptr():
        theta.copy_(flat.view(theta.shape))
