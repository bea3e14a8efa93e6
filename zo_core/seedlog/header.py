"""The header of a seed log: it identifies a run, and shows whether an engine belongs to that run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint import check_settings, take_normaliser
from ..errors import StateError
from ..estimators import ESTIMATORS
from ..noise import NOISES
from ..optimizer import number
from ..rules import RULES
from ..targets import TARGETS, WRAPPERS, parts_of
from ..version import __version__
from .fingerprint import check_base, check_slots, fingerprint
from .format import Settings
from .log import SeedLog

if TYPE_CHECKING:
    from ..engine import ZeroOrder

#: Settings that determine what a run measures. Repeating its steps does not depend on them.
MEASURING = ("estimator", "eps", "clip", "dropout", "maximize")


def check_continued(engine: ZeroOrder, log: SeedLog) -> None:
    """Checks that an engine continues the run of a log: all settings are equal, and `check_run` passes.

    An engine without a seed takes the log's.

    Raises:
        StateError: the engine belongs to another run; the message has both sides.
    """
    logged = next((entry.settings for entry in log.steps if entry.step >= engine.step_count), log.parsed.settings)
    theirs = {name: log.header[name] for name in (*_facts(engine), *MEASURING) if name in log.header}
    theirs["num_probes"] = log.header.get("own_probes", log.header["num_probes"])
    theirs["normalise"] = (log.header.get("normaliser") or {"name": False})["name"]
    eps = theirs.pop("eps")  # of the first group; the other groups have ratios, which are compared in each step
    if eps != engine.continuity.given["eps"][0]:
        theirs["eps"] = [eps * ratio for ratio in log.header["settings"]["eps"]]
    if RULES.resolve(theirs["rule"]).name == engine.rule.name and _varies(log):
        del theirs["rule"]
    check_settings(engine, theirs, f"the seed log {log.path}")
    if engine.config.seed is not None and engine.seed != logged.seed:
        said = engine.continuity.front.said
        raise StateError(
            f"the seed log {log.path} is of a run with {said({'seed': logged.seed})}, and this one has "
            f"{said({'seed': engine.seed})}; continue with the settings of that run, or "
            f"{engine.continuity.front.weights_alone}"
        )
    check_run(engine, log, engine.step_count)
    if engine.step_count == log.first_step:
        take_normaliser(engine, log.header.get("normaliser"))
        take_factor(engine, log)
    engine.at(engine.step_count, logged.seed)


def take_factor(engine: ZeroOrder, log: SeedLog) -> None:
    """Continues with what the brake multiplied learning rates by when the log began."""
    engine.optimizer.factor = log.header.get("factor", engine.optimizer.factor)


def _varies(log: SeedLog) -> bool:
    """Whether the rule changes from step to step (a scheduler cycles its momentum); then only its name must match."""
    return any(entry.rule != log.header["rule"] for entry in log.steps)


def check_run(engine: ZeroOrder, log: SeedLog, step: int, *, frozen: bool = True) -> None:
    """Checks that an engine can repeat the steps of a log.

    The weights are compared only if they are those of the log's first step: the log has no fingerprint of later
    weights, and the weights of an interrupted run are ahead of the step.

    Args:
        engine: the engine to check.
        log: the log of the run.
        step: the step that the engine starts at.
        frozen: also compare the parameters that do not move.

    Raises:
        StateError: the engine cannot repeat the steps; the message has both sides.
    """
    name = f"the seed log {log.path}"
    now = _facts(engine)
    if _varies(log) and RULES.resolve(log.header["rule"]).name == engine.rule.name:
        del now["rule"]
    total, own = log.header["num_probes"], log.header.get("own_probes")
    now["num_probes"] = total if engine.own_probes in (total, own) else engine.own_probes
    for key, value in now.items():
        if log.header[key] != value:
            raise StateError(f"{name} is of a run with {key}={log.header[key]!r}, and this one has {key}={value!r}")
    if step == log.first_step and engine.continuity.ahead <= step:
        check_base(log.header["base"], fingerprint(engine), name, frozen=frozen)
    else:
        shapes = {s.key: [list(s.shape), str(s.tensor.dtype).removeprefix("torch.")] for s in engine.slots}
        check_slots(log.header["base"], {"slots": shapes}, name)


def _facts(engine: ZeroOrder) -> dict[str, Any]:
    """The settings that determine the update and do not change during a run, except for the rule's own settings."""
    config = engine.config
    return {
        "target": TARGETS.describe(engine.target),
        "noise": NOISES.describe(engine.noise),
        "rule": RULES.describe(engine.rule),
        "stochastic_rounding": config.stochastic_rounding,
    }


def make_header(engine: ZeroOrder) -> dict[str, Any]:
    """Builds the header of a log that begins at the engine's next step."""
    settings, _ = current(engine)
    limits = []
    if engine.rule.wants_optimizer:
        limits.append(
            f"the rule {engine.rule.name!r} leaves the update to {type(engine.optimizer.inner).__name__}, "  # type: ignore[attr-defined]
            "whose arithmetic is its own: the log can be read, and a run resumed from a checkpoint, but not replayed"
        )
    elif engine.places.used():
        limits.append(
            f"the rule {engine.rule.name!r} has state from before this log: the log continues a checkpoint, "
            "but cannot be replayed on weights alone"
        )
    elif engine.step_count and engine.optimizer.thresholds:
        limits.append(
            "the thresholds of the noise's masks are of weights from before this log: the log continues a checkpoint, "
            "but cannot be replayed on weights alone"
        )
    notes = []
    if engine.config.dropout:
        notes.append(
            "dropout is on, and the masks of a step are not in the log: a run that resumes does one forward for each "
            "step it repeats, so that the random generators advance as they did; replay needs none"
        )
    return {
        "zo": __version__,
        "torch": torch.__version__,
        "first_step": engine.step_count,
        **_facts(engine),
        "num_probes": engine.num_probes,
        "own_probes": engine.own_probes,  # of each process
        "estimator": ESTIMATORS.describe(engine.estimator),
        "eps": engine.continuity.given["eps"][0],
        "clip": engine.config.clip,
        "maximize": engine.config.maximize,
        "scores": engine.scored,
        "dropout": engine.config.dropout,
        "normaliser": None if engine.normaliser is None else engine.normaliser.saved(),
        **({} if engine.optimizer.factor == 1.0 else {"factor": engine.optimizer.factor}),
        "windows": bool(engine.updaters.windows.of),  # of low rank; compiled models have none with any noise
        "limits": limits,
        "notes": notes,
        "prefix": _prefix(engine),
        "settings": settings.to_dict(),
        "base": fingerprint(engine),
    }


def _prefix(engine: ZeroOrder) -> str:
    """The prefix of parameter names before their slot keys, without wrappers."""
    slot = engine.slots[0]
    held = {id(tensor) for tensor in slot.leads}
    named = parts_of(engine.model.named_parameters())
    name = next((name for name, tensor, _ in named if id(tensor) in held), slot.key)
    plain = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    return plain.removesuffix(slot.key)


def current(engine: ZeroOrder, columns: Iterable[int] | None = None) -> tuple[Settings, tuple[float, ...]]:
    """The engine's settings and the learning rates of its groups.

    Args:
        engine: the engine.
        columns: the column of each group's learning rate so far; it is kept if it still fits.

    Returns:
        The settings, and the rates as they are applied: as the brake has lowered them.
    """
    groups, of = engine.optimizer.param_groups, engine.optimizer.groups_of(engine.slots)
    index = {id(group): i for i, group in enumerate(groups)}
    group_of = tuple(index[id(of[slot])] for slot in engine.slots)
    relative = {index[id(group)]: engine.directions.relative_eps(group) for group in of.values()}
    lrs = tuple(engine.directions.rates())
    kept = None if columns is None else tuple(columns)
    if kept is None or not _fit(kept, lrs):
        distinct = list(dict.fromkeys(lrs))
        kept = tuple(distinct.index(lr) for lr in lrs)
    settings = Settings(
        engine.seed,
        group_of,
        tuple(relative.get(i, 1.0) for i in range(len(groups))),
        tuple(number(group, "weight_decay", 0.0) for group in groups),
        kept,
    )
    return settings, lrs


def _fit(columns: tuple[int, ...], lrs: tuple[float, ...]) -> bool:
    """Whether all groups of a column have the same learning rate."""
    return len(columns) == len(lrs) and len(set(zip(columns, lrs, strict=True))) == len(set(columns))


def updates(settings: Settings, lrs: tuple[float, ...], rule: Any) -> dict[str, Any]:
    """The settings that determine an update besides its probes; columns only concern the encoding."""
    return {
        "lr": lrs,
        "weight_decay": settings.weight_decay,
        "eps ratios": settings.eps,
        "seed": settings.seed,
        "rule": rule,
        "groups": settings.group_of,
    }
