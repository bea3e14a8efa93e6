"""The interface of the engine to schedulers, checkpoints and callbacks: a torch optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from .checkpoint import (
    Run,
    check_state,
    factor_of,
    keys_in,
    marked,
    plain_state,
    thresholds_of,
    took_over,
    window_of,
)
from .config import is_distance
from .defaults import NEWTON
from .errors import ConfigError, StateError
from .estimators import Spsa
from .state_keys import in_order, keys_of
from .targets import Slot, held
from .updates import Places, Updaters
from .writers import OWN, written_by


class Driver(Run, Protocol):
    """The part of an engine that its optimizer uses."""

    places: Places
    updaters: Updaters

    def measure(self, closure: Callable[[], Any]) -> Tensor: ...

    def complete(self) -> None: ...

    def apply(self) -> Any: ...

    def flush(self) -> None: ...

    def store_state(self, windows: Mapping[int, Mapping[str, Any]] | None = None) -> None: ...


class ZOOptimizer(torch.optim.Optimizer):
    """An optimizer whose `step` applies what an engine has measured.

    It holds the hyperparameters (``param_groups`` with ``lr``, ``eps`` and ``weight_decay``) and the
    state of the rule (momentum), so learning-rate schedulers and checkpoints work as with any other.
    A `ZeroOrder` makes its own; build one by hand to give groups of parameters their own values:

        ZeroOrder(model, optimizer=ZOOptimizer([
            {"params": model.encoder.parameters(), "lr": 1e-7},
            {"params": model.head.parameters(), "lr": 1e-5, "eps": 1e-2},
        ]))

    Args:
        params: tensors, or dicts with ``params`` and any of the other arguments.
        lr: learning rate. None leaves it to the engine, whose steps are then normalised; a rate in some of the groups
            needs one in all of them.
        eps: distance of the probes from the weights.
        weight_decay: decoupled weight decay.

    Attributes:
        left: whether the learning rate was left to the engine.

    Raises:
        ConfigError: a value is not valid.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | None = None,
        eps: float = Spsa.default_eps,
        weight_decay: float = 0.0,
    ):
        self.engine: Driver | None = None
        #: Thresholds of a noise that masks by magnitude, by slot: fixed when training begins, hence part of the state.
        self.thresholds: dict[str, float] = {}
        #: What the brake multiplies all learning rates by, after those of the groups; schedulers do not see it.
        self.factor = 1.0
        groups = _as_groups(params)
        given = ["lr" in group for group in groups]
        if lr is None and any(given) and not all(given):
            raise ConfigError(
                [f"lr is missing in group {given.index(False)}, and other groups have one; write it there, or pass lr="]
            )
        self.left = lr is None and not any(given)
        if lr is None:
            lr = NEWTON  # until an engine sets another one
        super().__init__(groups, {"lr": lr, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        problems = group_problems({**self.defaults, **param_group})
        if problems:
            raise ConfigError(problems)
        super().add_param_group(param_group)
        group = self.param_groups[-1]  # of DTensors, what this process holds moves
        group["params"] = [held(parameter) for parameter in group["params"]]

    def groups_of(self, slots: Iterable[Slot]) -> dict[Slot, dict[str, Any]]:
        """The group of each slot; call it again after a state was loaded, which replaces the groups.

        Raises:
            ConfigError: a group has a hyperparameter that is not a number.
        """
        self.check_numbers()
        if len(self.param_groups) == 1:  # this is asked several times at every step
            return dict.fromkeys(slots, self.param_groups[0])
        by_tensor = {id(tensor): group for group in self.param_groups for tensor in group["params"]}
        return {slot: next(by_tensor[id(t)] for t in slot.tensors if id(t) in by_tensor) for slot in slots}

    def cover(self, slots: Iterable[Slot], alike: Callable[[Slot, dict[str, Any]], bool] | None = None) -> None:
        """Adds those of ``slots`` that no group holds yet, each before the later ones, as in a new optimizer.

        Args:
            slots: a new one is added to the first group that is ``alike``, or else to the first group.
            alike: whether a slot belongs in a group; None compares the slot's own hyperparameters.
        """
        slots = list(slots)
        held = {id(tensor) for group in self.param_groups for tensor in group["params"]}
        place = {id(tensor): index for index, slot in enumerate(slots) for tensor in slot.tensors}
        for index, slot in enumerate(slots):
            if not any(id(tensor) in held for tensor in slot.tensors):
                fits = [group for group in self.param_groups if (alike or _has_values_of)(slot, group)]
                params = (fits or self.param_groups)[0]["params"]
                later = (at for at, tensor in enumerate(params) if place.get(id(tensor), -1) > index)
                params.insert(next(later, len(params)), slot.tensor)

    def check_numbers(self) -> None:
        """Raises `ConfigError` if a hyperparameter is not a finite number, before anything moves."""
        problems = [
            f"{name}={group.get(name)!r} in the optimizer's param_groups is not a finite number"
            for group in self.param_groups
            for name in ("lr", "eps", "weight_decay")
            if not math.isfinite(number(group, name, math.nan))
        ]
        if problems:
            raise ConfigError(problems)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Applies what was measured since the last step; with a closure, measures it first.

        Returns:
            The `StepRecord`, which is a float: the loss.

        Raises:
            StateError: no engine is attached, or nothing was measured.
        """
        if self.engine is None:
            raise StateError(
                "ZOOptimizer.step() has no engine that measures losses; pass it on as "
                "ZeroOrder(model, optimizer=...), or let ZOTrainer or a zo strategy use it"
            )
        if closure is not None:
            self.engine.measure(closure)
        self.engine.complete()
        with self.engine.continuity.applying():
            return self.engine.apply()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops gradients that other code has computed; training computes none."""
        super().zero_grad(set_to_none)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As for any optimizer, but the state keeps its own dtype: momentum of bf16 weights is float32.

        Raises:
            StateError: another optimizer or a run with other settings wrote the state; nothing was loaded.
            ValueError: the state does not fit; nothing was loaded.
        """
        check_state(state_dict, self.engine, OWN, {key for group in self.param_groups for key in group})
        state_dict = self._in_order(state_dict)
        self._check_state(state_dict)
        super().load_state_dict({**state_dict, "state": {}})
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, tensor in zip(ids, tensors, strict=True):
            streamed = self.engine is not None and self.engine.places.streams_state(tensor)
            for name, value in plain_state(state_dict, index).items():
                if isinstance(value, Tensor) and not streamed:  # a store copies it anyway
                    value = value.detach().to(tensor.device, copy=True)
                self.state[tensor][name] = value
        self._load_extras(state_dict)

    def _in_order(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The state with the parameters in our order."""
        if self.engine is None:
            return state_dict
        front = self.engine.continuity.front
        return in_order(state_dict, keys_in(state_dict), self._keys(), self.param_groups, front.weights_alone)

    def _keys(self) -> list[str]:
        return [] if self.engine is None else keys_of(self.engine.model, self.engine.slots, self.param_groups)

    def _check_state(self, state_dict: dict[str, Any]) -> None:
        problems = [problem for group in state_dict["param_groups"] for problem in group_problems(group)]
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, tensor in zip(ids, tensors, strict=False):  # a wrong count has an error of its own
            problems += [
                f"{name} of parameter {index} has the shape {list(value.shape)}, the parameter {list(tensor.shape)}"
                for name, value in plain_state(state_dict, index).items()
                if isinstance(value, Tensor) and value.shape != tensor.shape
            ]
        problems += self._window_problems(state_dict)
        known = thresholds_of(state_dict)
        if not isinstance(known, dict) or not all(isinstance(value, float) for value in known.values()):
            problems.append("the thresholds of its masks are not numbers")
        if problems:
            raise ValueError("; ".join(problems))

    def state_dict(self) -> dict[str, Any]:
        """As for any optimizer, after applying the updates that are pending for streamed blocks, and with our mark."""
        if self.engine is None:
            return self._marked(super().state_dict())
        self.engine.flush()
        result = super().state_dict()
        result["state"] = {index: self.engine.places.whole(kept) for index, kept in result["state"].items()}
        return self._marked(result)

    def _window_problems(self, state_dict: dict[str, Any]) -> list[str]:
        """What is wrong with the pending low-rank updates in a checkpoint."""
        waiting = ((index, tensor, window_of(state_dict, index)) for index, tensor in self._indexed(state_dict))
        return [
            f"parameter {index} has low-rank updates of another noise; give it the run's"
            for index, tensor, window in waiting
            if window and (self.engine is None or not self.engine.updaters.fits(tensor, window))
        ]

    def _indexed(self, state_dict: dict[str, Any]) -> list[tuple[int, Tensor]]:
        """The tensors with their indices in a checkpoint."""
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        return list(zip(_indices(state_dict), tensors, strict=False))

    def _load_extras(self, state_dict: dict[str, Any]) -> None:
        """Loads what a checkpoint has in addition to an optimizer's state: thresholds, pending updates, our mark."""
        self.thresholds.clear()
        self.thresholds.update(thresholds_of(state_dict))
        self.factor = factor_of(state_dict)
        if self.engine is not None:
            windows = {id(tensor): window_of(state_dict, index) for index, tensor in self._indexed(state_dict)}
            self.engine.store_state(windows)
            took_over(state_dict, self.engine)

    def _marked(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        waiting = {} if self.engine is None else self.engine.updaters.saved()
        windows = {index: waiting[id(t)] for index, t in self._indexed(state_dict) if id(t) in waiting}
        keys = dict(zip(_indices(state_dict), self._keys(), strict=False))
        return marked(state_dict, self.engine, windows, dict(self.thresholds), self.factor, keys)

    def take_thresholds(self, known: dict[str, float], before: Iterable[Slot], now: Iterable[Slot]) -> None:
        """Adopts the thresholds of another engine over the same tensors, whose slots may have had other keys."""
        keys = {id(slot.tensor): slot.key for slot in before if slot.key in known}
        self.thresholds.update({s.key: known[keys[id(s.tensor)]] for s in now if id(s.tensor) in keys})

    def __getstate__(self) -> dict[str, Any]:
        kept = {"thresholds": self.thresholds, "left": self.left, "factor": self.factor}
        return {**super().__getstate__(), "engine": None, **kept}


def _as_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    """The groups that torch would make of ``params``, each with a list of tensors."""
    given = list(params)
    if not given or not isinstance(given[0], dict):
        given = [{"params": given}]
    alone = (Tensor, str)
    return [
        {**group, "params": [group["params"]] if isinstance(group["params"], alone) else list(group["params"])}
        for group in given
    ]


def _indices(state_dict: dict[str, Any]) -> list[int]:
    return [index for group in state_dict["param_groups"] for index in group["params"]]


def _has_values_of(slot: Slot, group: dict[str, Any]) -> bool:
    return all(group[name] == value for name, value in slot.own.items())


def param_groups(slots: Iterable[Slot]) -> list[dict[str, Any]]:
    """Groups for a `ZOOptimizer`: one, and another for each set of hyperparameters of the slots' own."""
    groups: dict[tuple[tuple[str, float], ...], dict[str, Any]] = {}
    for slot in slots:
        group = groups.setdefault(tuple(sorted(slot.own.items())), {"params": [], **slot.own})
        group["params"].append(slot.tensor)
    return list(groups.values())


def number(group: dict[str, Any], name: str, otherwise: float) -> float:
    """A hyperparameter as a float; ``otherwise`` if the optimizer has none, like Adafactor with ``lr=None``."""
    value = group.get(name)
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 else otherwise
    return float(value) if isinstance(value, (int, float)) else otherwise


def group_problems(group: dict[str, Any]) -> list[str]:
    """What is wrong with the hyperparameters of a group."""
    wanted: tuple[tuple[str, Callable[[float], bool], str], ...] = (
        ("lr", lambda x: x >= 0, "of at least 0"),
        ("eps", is_distance, "above 0 that float32 can hold"),
        ("weight_decay", lambda x: x >= 0, "of at least 0"),
    )
    problems = []
    for name, allowed, words in wanted:
        value: Any = group.get(name)
        number = isinstance(value, (int, float, Tensor)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not allowed(value):
            problems.append(f"{name}={value!r} must be a number {words}")
    return problems


#: Optimizers that cannot work with an estimate of the gradient in ``.grad``.
UNUSABLE = {
    torch.optim.LBFGS: "calls the closure itself and needs exact gradients",
    torch.optim.SparseAdam: "accepts only sparse gradients, and the estimate is dense",
}


def check_optimizer(optimizer: object) -> None:
    """Raises `ConfigError` for what cannot be the optimizer of an engine; None is accepted."""
    if optimizer is None:
        return
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            [
                f"optimizer={optimizer!r} is not an optimizer; pass an object, for example "
                "optimizer=torch.optim.AdamW(model.parameters(), lr=1e-4), or leave it out"
            ]
        )
    problems = [
        f"optimizer={type(optimizer).__name__}(...) {why}; pass one that steps on .grad, for example torch.optim.AdamW"
        for unusable, why in UNUSABLE.items()
        if isinstance(optimizer, unusable)
    ]
    groups = optimizer.param_groups if type(optimizer).__module__.startswith("torch.optim.") else ()
    for group in groups:
        if not math.isfinite(number(group, "lr", math.nan)):
            problems.append(f"lr={group.get('lr')!r} of {type(optimizer).__name__} must be a number, for example 1e-4")
        if group.get("differentiable"):
            problems.append(
                f"differentiable=True of {type(optimizer).__name__} is for differentiating through its step, which "
                "weights that are trained do not allow; leave it out"
            )
    if problems:
        raise ConfigError(problems)


class TorchOptimizerFace(ZOOptimizer):
    """A `ZOOptimizer` in front of a torch optimizer, whose groups and state it shares."""

    def __init__(self, inner: torch.optim.Optimizer):
        self.inner = inner
        super().__init__([tensor for group in inner.param_groups for tensor in group["params"]])
        self._share()

    def _share(self) -> None:
        self.param_groups = self.inner.param_groups
        self.state = self.inner.state
        self.defaults = self.inner.defaults

    def check_numbers(self) -> None:
        """Does nothing: the torch optimizer decides what its hyperparameters may be."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if getattr(self, "param_groups", None) is self.inner.param_groups:
            self.inner.add_param_group(param_group)
        else:
            super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        return self._marked(self.inner.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As for the torch optimizer; a state that it wrote in a run with backpropagation is also accepted."""
        check_state(state_dict, self.engine, written_by({"param_groups": self.param_groups, "state": self.state}))
        state_dict = self._in_order(state_dict)
        self.inner.load_state_dict(state_dict)
        self._share()
        self._load_extras(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "inner": self.inner}
