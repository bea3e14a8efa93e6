"""Continuing a run: the mark in checkpoints, and the settings that have to agree with those of the earlier run.

An optimizer state carries one entry of this library, ``"zo"``. It distinguishes our checkpoints from those of other
optimizers, whose hyperparameters may have the same names but other meanings: Adam's ``eps`` is not a distance.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from .backprop import Backprop
from .brake import Braking
from .config import ZOConfig
from .errors import RanksError, StateError
from .estimators import ESTIMATORS, Estimator
from .noise import NOISES, Noise, derive_seed
from .normaliser import Curvature, Normaliser, normaliser_of
from .rules import RULES, UpdateRule
from .targets import TARGETS, Slot, Target
from .writers import OWN, is_own, written_by

MARK = "zo"
#: Version of the mark; a newer mark may contain something that this version does not know.
VERSION = 1


@dataclass(frozen=True)
class FrontEnd:
    """The wording of a front end, for messages.

    Attributes:
        names: what its users write for a setting, where that differs from the setting's name.
        weights_alone: how to start a new run with the weights of a checkpoint.
        same_optimizer: how to train with the optimizer that wrote a checkpoint.
        without_lr: how to train without a learning rate of one's own.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    weights_alone: str = "begin a new run from its weights: load them into the model, and leave the rest of it out"
    same_optimizer: str = "pass that optimizer as optimizer=..., which makes the rule 'torch'"
    without_lr: str = "leave it out"

    def said(self, settings: Mapping[str, Any]) -> str:
        """Settings as the user writes them; a value that all groups share is shown once."""
        return ", ".join(f"{self.names.get(name, name)}={_shown(value)}" for name, value in settings.items())


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)) and value:
        value = value[0] if all(each == value[0] for each in value) else list(value)
    return repr(value)


class Run(Protocol):
    """The part of an engine that this module uses: the settings of its run, and its progress."""

    config: ZOConfig
    model: nn.Module
    slots: list[Slot]
    estimator: Estimator
    noise: Noise
    rule: UpdateRule
    own_probes: int
    seed: int
    step_count: int
    merged: bool
    written: bool
    normaliser: Normaliser | None
    braking: Braking
    backprop: Backprop | None
    continuity: Continuity

    @property
    def target(self) -> Target: ...

    @property
    def eps(self) -> float: ...

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    def at(self, step: int, seed: int | None = None) -> None: ...


class Continuity:
    """What an engine knows about the run that it is part of.

    Attributes:
        given: the settings as they were when the engine was made. Those of a group may change during a run.
        front: the front end that made the engine.
        open: names of settings that the user has left open; a continued run takes those of the earlier one.
        ahead: the weights already contain the steps before this one, because a run in this process was
            interrupted: repeating those steps moves nothing.
        whole: False during an update, and after one that was interrupted.
    """

    def __init__(self, engine: Run):
        self.given = settings_of(engine)
        self.front = FrontEnd()
        self.open = {name for name in ("normalise",) if getattr(engine.config, name) is None}
        self.ahead = 0
        self.whole = True

    def speak_as(self, front: FrontEnd) -> None:
        """Makes messages use the wording of a front end from now on."""
        self.front = front

    @contextmanager
    def applying(self) -> Iterator[None]:
        """A context for code that moves weights; an interrupt in it leaves some of them moved and others not."""
        before, self.whole = self.whole, False
        try:
            yield
        except (
            StateError,
            RanksError,
        ):  # nothing was measured, or the log could not be written: no weight is half moved
            self.whole = before
            raise
        self.whole = before

    def differences(self, other: Mapping[str, Any], *, seed: int | None) -> list[str]:
        """Names of the settings that differ from ``other``.

        Args:
            other: settings, or some of them.
            seed: the seed that the user has set; None accepts any.
        """
        return [name for name in self.given if name in other and not self._agrees(name, other[name], seed)]

    def _agrees(self, name: str, value: Any, seed: int | None) -> bool:
        mine = self.given[name]
        if name in self.open:
            return True
        if name == "seed":
            return seed is None or mine == value
        if name in ("eps", "weight_decay"):
            if len(mine) != len(value):  # different groups raise an error of their own
                return True
            # A weight decay of 0 counts as not set, and then the checkpoint's is used.
            return all(
                own == each or (name == "weight_decay" and own == 0) for own, each in zip(mine, value, strict=True)
            )
        return bool(mine == value)


def settings_of(engine: Run) -> dict[str, Any]:
    """The settings that a continued run has to share, as plain values; learning rates may change, and are left out."""
    groups = engine.optimizer.param_groups
    torch_rule = engine.rule.wants_optimizer
    settings = {
        "estimator": ESTIMATORS.describe(engine.estimator),
        "noise": NOISES.describe(engine.noise),
        "rule": RULES.describe(engine.rule),
        "target": TARGETS.describe(engine.target),
        "num_probes": engine.own_probes,
        "eps": [engine.eps] if torch_rule else [float(group["eps"]) for group in groups],
        "clip": engine.config.clip,
        "maximize": engine.config.maximize,
        "dropout": engine.config.dropout,
        "stochastic_rounding": engine.config.stochastic_rounding,
        "normalise": False if engine.normaliser is None else engine.normaliser.name,
        "weight_decay": [] if torch_rule else [float(group["weight_decay"]) for group in groups],
        "seed": engine.seed,
        "backprop": engine.config.backprop,
    }
    return {name: _plain(value) for name, value in settings.items()}


def _plain(value: Any) -> Any:
    """Types that ``torch.load(weights_only=True)`` reads; other objects, of user-defined components, as their repr."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)


def marked(
    state: dict[str, Any],
    engine: Run | None,
    windows: Mapping[int, Mapping[str, Any]],
    thresholds: Mapping[str, float],
    factor: float = 1.0,
    keys: Mapping[int, str] | None = None,
) -> dict[str, Any]:
    """An optimizer state with our mark in it.

    Args:
        state: as the optimizer returns it.
        engine: the engine whose run it belongs to.
        windows: pending low-rank updates, by the index of the parameter.
        thresholds: thresholds of masks, by slot.
        factor: what the brake multiplies learning rates by.
        keys: names of the parameters, by index; see `zo_core.state_keys`.
    """
    mark: dict[str, Any] = {"version": VERSION, "settings": {}}
    if engine is not None:
        mark["settings"] = dict(engine.continuity.given)
        mark |= {"rule": rule} if (rule := _readable(engine.rule)) is not None else {}
        if engine.merged:
            mark["merged"] = True  # which the log records with the next step
        if engine.written:
            mark["written"] = True
        if engine.normaliser is not None:
            mark["normaliser"] = engine.normaliser.saved()
        mark["drawn"] = engine.seed  # seed of the directions; it differs from the given one in a second run
        mark |= {"brake": kept} if (kept := engine.braking.saved()) else {}
        mark |= {} if engine.backprop is None else {"backprop": engine.backprop.saved()}
    parts = ("windows", windows), ("thresholds", thresholds), ("keys", keys)
    mark |= {name: part for name, part in parts if part}
    mark |= {"factor": factor} if factor != 1.0 else {}
    return {**state, MARK: mark}


def window_of(state: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    """The pending low-rank updates of a parameter in a checkpoint; version 0.1 kept them in its state."""
    kept: Mapping[str, Any] = state.get(MARK, {}).get("windows", {}).get(index, {})
    old = state["state"].get(index, {})
    return kept or (old if "factor" in old else {})


def plain_state(state: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    """What the rule keeps for a parameter in a checkpoint."""
    found: Mapping[str, Any] = state["state"].get(index, {})
    return {} if "factor" in found else found


def thresholds_of(state: Mapping[str, Any]) -> Any:
    """The thresholds of masks in a checkpoint, by slot; version 0.1 had no mark."""
    return state.get(MARK, {}).get("thresholds", state.get("thresholds", {}))


def _readable(rule: UpdateRule) -> Any:
    """A rule with its numbers, which a schedule changes, as plain values; None if they do not give the rule back."""
    described = _plain(RULES.describe(rule))
    try:
        return described if RULES.resolve(described) == rule else None
    except ValueError:
        return None


def keys_in(state: Any) -> Mapping[int, str]:
    """The keys of the parameters in a checkpoint, by index; earlier versions kept none."""
    known: Mapping[int, str] = state.get(MARK, {}).get("keys", {}) if isinstance(state, Mapping) else {}
    return known


def factor_of(state: Mapping[str, Any]) -> float:
    """What the brake of a checkpoint's run multiplies learning rates by."""
    return float(state.get(MARK, {}).get("factor", 1.0))


def check_state(state: Any, engine: Run | None, own: str | None, extra: Collection[str] = ()) -> None:
    """Raises `StateError` for a state of another optimizer, or of a run with other settings.

    Args:
        state: of an optimizer, with our mark or without.
        engine: the engine that would continue with it; None checks only the writer.
        own: what writes such states in this run; None if that is not known.
        extra: further keys of this run's groups.
    """
    front = FrontEnd() if engine is None else engine.continuity.front
    if not isinstance(state, Mapping) or "param_groups" not in state or "state" not in state:
        return  # loading it reports what is missing
    mark = state.get(MARK)
    if mark is not None:
        if not isinstance(mark, Mapping) or not isinstance(mark.get("version"), int):
            raise StateError(f"this checkpoint is damaged: its mark is {mark!r}; take an earlier one")
        if mark["version"] > VERSION:
            raise StateError(
                f"this checkpoint was written by a newer version (its mark has version {mark['version']}, and this one "
                f"reads {VERSION}); update zo-trainer"
            )
    if engine is not None:
        check_settings(engine, _known(state, own, extra), "this checkpoint")
        if engine.backprop is not None:
            engine.backprop.check((mark or {}).get("backprop"))
    writer = OWN if own == OWN and is_own(state, extra) else written_by(state)
    if own == OWN:
        if writer != OWN and (mark is None or writer is not None):
            raise StateError(_foreign(state, writer, OWN, front))
    elif own is not None and writer is not None and writer != own:
        raise StateError(_foreign(state, writer, own, front))


def _known(state: Mapping[str, Any], own: str | None, extra: Collection[str]) -> Mapping[str, Any]:
    """What a state records about the settings of its run; version 0.1 recorded only the groups."""
    if MARK in state:
        settings: Mapping[str, Any] = state[MARK].get("settings", {})
        return settings
    if own != OWN or not is_own(state, extra):
        return {}
    return {name: [float(group[name]) for group in state["param_groups"]] for name in ("eps", "weight_decay")}


def check_settings(engine: Run, other: Mapping[str, Any], whose: str) -> None:
    """Raises `StateError`, naming both values, if settings of an engine differ from ``other``.

    Args:
        engine: the engine of the continued run.
        other: settings, or some of them.
        whose: what they belong to, for the message.
    """
    continuity = engine.continuity
    names = continuity.differences(other, seed=engine.config.seed)
    if names:
        theirs, mine = ({name: side[name] for name in names} for side in (other, continuity.given))
        raise StateError(
            f"{whose} is of a run with {continuity.front.said(theirs)}, and this one has "
            f"{continuity.front.said(mine)}; continue with the settings of that run, or "
            f"{continuity.front.weights_alone}"
        )


def took_over(state: Mapping[str, Any], engine: Run) -> None:
    """Adopts what a loaded state records: the rule's numbers, and what this run leaves open, seed and weight decay."""
    mark = state.get(MARK, {})
    given = engine.continuity.given
    given.update(
        {name: mark["settings"][name] for name in ("seed", "weight_decay") if name in mark.get("settings", {})}
    )
    engine.at(engine.step_count, mark.get("drawn", given["seed"]))
    if mark.get("rule", rule := _readable(engine.rule)) != rule:
        engine.rule = RULES.resolve(mark["rule"])
    engine.merged, engine.written = mark.get("merged", False), mark.get("written", False)
    if mark.get("settings") or (MARK not in state and "normalise" in engine.continuity.open):
        take_normaliser(engine, mark.get("normaliser"))  # whose rates the checkpoint has
    engine.braking.load(mark.get("brake", {}))
    if engine.backprop is not None:
        engine.backprop.load(mark["backprop"])
    engine.continuity.ahead, engine.continuity.whole = 0, True


def take_normaliser(engine: Run, state: dict[str, float | str] | None) -> None:
    """Continues with the normaliser of an earlier run; None if that had none."""
    size = engine.normaliser.size if isinstance(engine.normaliser, Curvature) else 1.0
    name = None if state is None else str(state["name"])
    engine.normaliser = normaliser_of(name, size, two_sided=engine.estimator.two_sided)
    if engine.normaliser is not None and state is not None:
        engine.normaliser.load(state)
    engine.continuity.given["normalise"] = False if state is None else state["name"]


def _foreign(state: Mapping[str, Any], writer: str | None, own: str, front: FrontEnd) -> str:
    keys = ", ".join(sorted({key for group in state["param_groups"] for key in group if key != "params"}))
    by = writer or f"an optimizer whose groups have {keys}"
    mine = "zeroth-order training has a ZOOptimizer" if own == OWN else f"this run has {own}"
    way = f"; or {front.same_optimizer}" if own == OWN and writer != OWN else ""
    return f"the optimizer state of this checkpoint was written by {by}, and {mine}; {front.weights_alone}{way}"


def check_checkpoint(state: Any, engine: Run) -> None:
    """Raises `StateError` if this is no checkpoint of an engine, or if its seed is not the one that the user set."""
    missing = [key for key in ("step", "seed", "optimizer") if not isinstance(state, dict) or key not in state]
    if missing:
        is_state = isinstance(state, dict) and {"state", "param_groups"} <= state.keys()
        by = f"; it is the state of an optimizer, {written_by(state) or OWN}" if is_state else ""
        raise StateError(f"this is not a checkpoint of ZeroOrder: {', '.join(missing)} missing{by}")
    if not isinstance(state["step"], int) or state["step"] < 0 or not isinstance(state["seed"], int):
        raise StateError(
            f"this checkpoint is damaged: step={state['step']!r}, seed={state['seed']!r} are not whole numbers"
        )
    if not isinstance(state["optimizer"], Mapping) or MARK not in state["optimizer"]:
        check_settings(engine, {"seed": state["seed"]}, "this checkpoint")


def resume_at(engine: Run, state: Mapping[str, Any]) -> None:
    """Adopts the step and the seed of a checkpoint whose optimizer state was loaded."""
    if MARK not in state["optimizer"]:
        engine.continuity.given["seed"] = state["seed"]
    engine.at(state["step"], state["seed"])


def next_seed(seed: int) -> int:
    """The seed of the next run after one with this seed."""
    return derive_seed(seed, 0, -1)  # no direction has this index
