"""The settings of a live engine: those that can be set, and errors for those where that would have no effect."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from .config import Resolved, ZOConfig
from .errors import ConfigError, StateError
from .optimizer import TorchOptimizerFace, ZOOptimizer, group_problems
from .rules import UpdateRule
from .step import StepPlan
from .updates import Updaters

#: Settings that have no effect any more once the engine is made.
FIXED = frozenset(field.name for field in fields(ZOConfig)) - {"lr", "eps", "weight_decay", "rule"}
CHANGED_EPS = "eps cannot change while a step is being measured; set it between two steps"


class LiveSettings:
    """Base class of the engine with the attributes that are settings."""

    optimizer: ZOOptimizer
    updaters: Updaters
    rule: UpdateRule
    _settings: Resolved
    _default_eps: float
    _plan: StepPlan | None
    _made = False

    def __setattr__(self, name: str, value: Any) -> None:
        """Raises for settings that a live engine cannot change and for misspelt names, instead of ignoring them."""
        if self._made:
            if name in FIXED:
                raise AttributeError(
                    f"{name} is fixed once the engine is made; make another one: "
                    f"ZeroOrder(model, zo.config.replace({name}={value!r}))"
                )
            if name == "rule" and not isinstance(value, UpdateRule):
                raise AttributeError(f"rule={value!r} must be a rule itself, for example zo_core.Momentum(0.9)")
            if not name.startswith("_") and not hasattr(self, name):
                raise AttributeError(f"ZeroOrder has no attribute {name!r} that could be set")
            if name == "rule":
                if type(value) is not type(self.rule):
                    raise AttributeError(
                        f"rule={self.rule.name!r} is fixed once the engine is made, only its numbers may change; make "
                        f"another one: ZeroOrder(model, zo.config.replace(rule={value!r}))"
                    )
                if value.anchored != self.rule.anchored:
                    raise AttributeError(
                        "decay_to is fixed once the engine is made, because the rule keeps the weights of the start; "
                        f"make another engine: ZeroOrder(model, zo.config.replace(rule={value!r}))"
                    )
        super().__setattr__(name, value)
        if name == "rule" and self._made:
            self.updaters.follow(value)

    @property
    def lr(self) -> float:
        """The learning rate of the first parameter group; setting it sets it in all groups."""
        return float(self.optimizer.param_groups[0]["lr"])

    @lr.setter
    def lr(self, value: float) -> None:
        self._set_in_groups("lr", value)

    @property
    def eps(self) -> float:
        """The probe distance of the first parameter group; setting it sets it in all groups."""
        if isinstance(self.optimizer, TorchOptimizerFace):
            return self._default_eps  # what a torch optimizer calls eps is something else
        return float(self.optimizer.param_groups[0]["eps"])

    @eps.setter
    def eps(self, value: float) -> None:
        if isinstance(self.optimizer, TorchOptimizerFace):
            raise AttributeError("eps is fixed where a torch optimizer does the updates; make another engine")
        self._set_in_groups("eps", value)

    def _group_eps(self) -> list[Any]:
        """The eps of each group; none where a torch optimizer does the updates."""
        own = not isinstance(self.optimizer, TorchOptimizerFace)
        return [float(group["eps"]) for group in self.optimizer.param_groups] if own else []

    @property
    def weight_decay(self) -> float:
        """The weight decay of the first parameter group; setting it sets it in all groups."""
        return float(self.optimizer.param_groups[0].get("weight_decay", 0.0))

    @weight_decay.setter
    def weight_decay(self, value: float) -> None:
        self._set_in_groups("weight_decay", value)

    def _set_in_groups(self, name: str, value: float) -> None:
        problems = group_problems({"lr": 0.0, "eps": 1.0, "weight_decay": 0.0, name: value})
        if problems:
            raise ConfigError(problems)
        if self._plan is not None and name == "eps":
            raise StateError(CHANGED_EPS)
        for owner in (self.optimizer, getattr(self.optimizer, "inner", self.optimizer)):
            for group in owner.param_groups:
                if name in group:
                    group[name] = value
