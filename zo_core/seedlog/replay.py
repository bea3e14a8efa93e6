"""Repeats the steps of a log, many in one pass over each slot.

An update depends only on the slot's own weights and state. So slots do not move together, step by step:
each slot (on the CPU each piece of it that fits into the cache) takes all its steps at once.
A streamed block is read and written once for any number of steps.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace as changed
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ZOConfig
from ..engine import ZeroOrder
from ..errors import ModelError, StateError
from ..noise import Direction
from ..noise.direction import piece_size
from ..noise.hashing import BATCH_WORDS
from ..optimizer import ZOOptimizer
from ..progress import Bar
from ..rules import RULES, UpdateRule
from ..targets import TARGETS, WRAPPERS, Slot, Target, Trainable
from ..updates import State
from .format import LoggedStep
from .header import check_run
from .log import SeedLog

Advance = Callable[[int], None]
Move = tuple[UpdateRule, Direction, float, float]

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
    if start == log.first_step and engine.places.used():
        raise StateError("the engine has rule state from other steps, which a replay would use; make a new engine")
    if start == log.first_step:
        engine.optimizer.thresholds.clear()  # the thresholds of this run come from the weights at its start
    steps = [entry for entry in log.steps if start <= entry.step < end]
    if not log.header.get("windows", True):
        engine.updaters.wait_no_more(engine.rule)
    apply_steps(engine, list(log.header["base"]["slots"]), steps, progress=progress)
    if engine.normaliser is not None:
        for entry in steps:
            if entry.normaliser is not None and not entry.skipped:
                engine.normaliser.repeat(entry.step, entry.normaliser)
    engine.at(end, steps[-1].settings.seed if steps else None)
    if steps:
        engine.rule = _rule(steps[-1], engine, RULES.describe(engine.rule))
    return end


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
        target=header["target"],
        noise=header["noise"],
        rule=header["rule"],
        num_probes=header["num_probes"],
        stochastic_rounding=header["stochastic_rounding"],
        normalise=(header.get("normaliser") or {"name": False})["name"],
    )
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


def apply_steps(engine: ZeroOrder, keys: list[str], steps: Sequence[LoggedStep], *, progress: bool = False) -> None:
    """Applies steps to the slots of an engine.

    Args:
        engine: the engine, at the first of the steps.
        keys: keys of the slots, in the order of ``Settings.group_of``.
        steps: the steps, in order.
        progress: show a progress bar.
    """
    parts, steps = _parts(steps), [entry for entry in steps if not entry.skipped]
    position = {key: index for index, key in enumerate(keys)}
    bar = Bar(len(steps) * sum(slot.tensor.numel() for slot in engine.slots), "replay") if progress else None
    advance: Advance = (lambda amount: None) if bar is None else bar.advance
    with torch.no_grad(), engine.hidden():
        for slot in engine.slots:
            updater = engine.updaters.of[slot]
            if updater.windowed:
                for merged, part in parts:
                    if merged:
                        updater.settle()
                    for move in _moves(engine, slot, position[slot.key], part, advance):
                        updater.update(*move)
                        advance(slot.tensor.numel())
            else:
                engine.places.move(slot, partial(_advance_slot, engine, slot, position[slot.key], steps, advance))
        engine.flush()
    engine.noise.forget(())
    torch.clear_autocast_cache()
    if bar is not None:
        bar.close()


def _parts(steps: Iterable[LoggedStep]) -> list[tuple[bool, list[LoggedStep]]]:
    """Splits the steps at the ends of windows, without skipped ones; the flag is whether windows end before a part."""
    parts: list[tuple[bool, list[LoggedStep]]] = [(False, [])]
    for entry in steps:
        if entry.merged:
            parts.append((True, []))
        if not entry.skipped:
            parts[-1][1].append(entry)
    return parts


def _advance_slot(
    engine: ZeroOrder,
    slot: Slot,
    index: int,
    steps: Sequence[LoggedStep],
    advance: Advance,
    theta: Tensor,
    state: State,
) -> None:
    """Applies all steps to one slot."""
    moves = _moves(engine, slot, index, steps, advance)
    plain = slot.scaling is None and all(type(direction) is Direction for _, direction, _, _ in moves)
    eager = theta.device.type == "cpu" and engine.backend == "eager"
    pieces = eager and plain and moves and theta.numel() >= BATCH_WORDS * moves[0][1].noise.values_per_word
    if pieces and engine.rule.elementwise and engine.num_probes <= CACHED_DIRECTIONS:
        _advance_pieces(engine, moves, advance, theta, state)
        return
    for rule, direction, lr, weight_decay in moves:
        rule.update(theta, state, direction, lr, weight_decay)
        advance(theta.numel())


def _moves(engine: ZeroOrder, slot: Slot, index: int, steps: Sequence[LoggedStep], advance: Advance) -> list[Move]:
    """Returns the moves of a slot; steps that do not move it only advance the progress."""
    moves: list[Move] = []
    own = RULES.describe(engine.rule)
    for entry in steps:
        group = entry.settings.group_of[index]
        settings = entry.settings
        how = settings.eps[group], entry.lrs[group], settings.weight_decay[group]
        _, direction, lr, weight_decay = engine.directions.move(slot, entry.probes, *how)
        if direction.still:
            advance(slot.tensor.numel())
            continue
        moves.append((_rule(entry, engine, own), direction, lr, weight_decay))
    return moves


def _rule(entry: LoggedStep, engine: ZeroOrder, own: str | dict[str, Any]) -> UpdateRule:
    """Returns the rule of a step; ``own`` describes the engine's rule."""
    return engine.rule if entry.rule == own else RULES.resolve(entry.rule)


def _advance_pieces(engine: ZeroOrder, moves: list[Move], advance: Advance, theta: Tensor, state: State) -> None:
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
