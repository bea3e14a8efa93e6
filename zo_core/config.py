"""A configuration: settings that fit together, and the components that they name."""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from .errors import ConfigError
from .estimators import ESTIMATORS, Estimator
from .noise import NOISES, LowRank, Noise
from .noise.direction import FLOAT32_MAX
from .normaliser import CURVATURE, GRADIENT
from .registry import Registry, similar
from .rules import RULES, Sgd, UpdateRule
from .settings import Settings
from .sizes import parse_bytes
from .targets import TARGETS, Target

BACKENDS = ("auto", "eager", "compile", "triton")
#: As a learning rate: it is found before the first step.
AUTO = "auto"
BRAKES = (AUTO, "rollback", "warn", None)
RANKS = ("directions", "data", "points", None)
OFFLOADS = (None, "cpu", "disk", "auto")


@dataclass(frozen=True)
class ZOConfig(Settings):
    """What to measure, along which directions, and how to move.

    Every component is a registered name, a dict ``{"name": ..., **fields}`` or an object; see
    ``list(zo_core.NOISES)`` and its siblings for the names. Each setting is described once, beside its
    default; `help_for` returns the text, and docs/settings.md lists all of them.
    """

    def __post_init__(self) -> None:
        problems: list[str] = []
        estimator = self._component("estimator", ESTIMATORS, problems)
        noise = self._component("noise", NOISES, problems)
        self._component("target", TARGETS, problems)
        if self.rule != "auto":
            self._component("rule", RULES, problems)
        if self.lr != AUTO:
            self._number("lr", problems, lambda x: x >= 0, "a number of at least 0, for example 1e-6, or 'auto'")
        self._number("eps", problems, is_distance, "a number above 0 that float32 can hold, for example 1e-3")
        self._number("weight_decay", problems, lambda x: x >= 0, "a number of at least 0", optional=False)
        if self.clip != math.inf:
            self._number("clip", problems, lambda x: x > 0, "a number above 0, or None for the target's default")
        if self.seed is not None and not is_seed(self.seed):
            problems.append(
                f"seed={self.seed!r} must be a whole number of at most 128 bits, or None for the trainer's seed"
            )
        for name in ("maximize", "dropout", "stochastic_rounding", "stack_probes", "reuse"):
            if not isinstance(getattr(self, name), bool):
                problems.append(f"{name}={getattr(self, name)!r} must be True or False")
        self._one_of("brake", BRAKES, problems)
        self._one_of("ranks", RANKS, problems)
        if self._one_of("backend", BACKENDS, problems) and self.backend == "triton" and not has_triton():
            problems.append("backend='triton' needs CUDA and the triton package; write backend='auto'")
        if estimator is not None:
            self._check_estimator(estimator, problems)
        if self.stack_probes is True:
            self._check_stacking(estimator, noise, problems)
        self._check_normalise(estimator, problems)
        self._check_offload(problems)
        self._check_backprop(problems)
        if problems:
            raise ConfigError(problems)

    def _check_estimator(self, estimator: Estimator, problems: list[str]) -> None:
        n, least = self.num_probes, estimator.min_probes
        if n is not None and (not isinstance(n, int) or isinstance(n, bool) or n < least):
            problems.append(
                f"num_probes={n!r} must be a whole number of at least {least} with estimator {estimator.name!r}"
            )
        if self.reuse is True and (self.stack_probes is True or estimator.differentiates):
            problems.append(
                "reuse=True has no use with stack_probes or estimator='forward_grad', which do not measure probe by "
                "probe; leave out one of them"
            )

    def _check_stacking(self, estimator: Estimator | None, noise: Noise | None, problems: list[str]) -> None:
        if estimator is not None and estimator.multiples and self._directions(estimator) != 1:
            problems.append(
                f"stack_probes=True with estimator={estimator.name!r} takes one direction, because it measures "
                "the sum of all directions; write num_probes=1, or leave out stack_probes"
            )
        if estimator is not None and estimator.differentiates:
            problems.append(
                f"stack_probes=True has no use with estimator={estimator.name!r}, which measures a direction in one "
                "forward; leave it out"
            )
        if noise is not None and not isinstance(noise, LowRank):
            problems.append(f"stack_probes=True needs noise='low_rank'; noise={noise.name!r} copies the weights")
        if self.offload in OFFLOADS[1:]:
            problems.append(
                f"stack_probes=True has no use with offload={self.offload!r}, where all probes share a sweep already; "
                "leave out one of them"
            )

    def _check_normalise(self, estimator: Estimator | None, problems: list[str]) -> None:
        if self.normalise not in (None, True, False, GRADIENT, CURVATURE):
            problems.append(
                f"normalise={self.normalise!r} must be {GRADIENT!r} (or True), {CURVATURE!r}, False or None"
            )
        elif self.normalise == CURVATURE and estimator is not None and estimator.scale_free and not estimator.slopes:
            problems.append(
                f"normalise={CURVATURE!r} needs an estimate of the gradient, and that of "
                f"estimator={estimator.name!r} does not depend on the scale of the loss; leave it out, or write "
                f"normalise={GRADIENT!r}"
            )

    def _directions(self, estimator: Estimator) -> int:
        return estimator.default_num_probes if self.num_probes is None else self.num_probes

    def _check_offload(self, problems: list[str]) -> None:
        known = self._one_of("offload", OFFLOADS, problems)
        if known and self.offload not in ("disk", "auto") and self.offload_dir is not None:
            problems.append(
                f"offload_dir={self.offload_dir!r} has no use with offload={self.offload!r}; write offload='disk'"
            )
        elif self.offload is None:
            problems += [
                f"{name}={getattr(self, name)!r} has no use without offload; write offload='auto'"
                for name in ("device_memory", "device")
                if getattr(self, name) is not None
            ]
        try:
            parse_bytes(self.device_memory)
        except ValueError:
            problems.append(
                f"device_memory={self.device_memory!r} must be a number of bytes, or one with a unit as in '8GB'"
            )
        if isinstance(self.blocks, str):
            problems.append(f"blocks={self.blocks!r} must be several names, for example [{self.blocks!r}]")
        elif self.blocks is not None:
            object.__setattr__(self, "blocks", tuple(self.blocks))  # a list in YAML and JSON

    def _check_backprop(self, problems: list[str]) -> None:
        self._number("backprop_lr", problems, lambda x: x >= 0, "a number of at least 0", optional=False)
        names = () if self.backprop is None else self.backprop
        several = isinstance(names, Collection) and not isinstance(names, str)
        if not several or not all(isinstance(name, str) and name for name in names):
            problems.append(f"backprop={self.backprop!r} must be several names, for example ['lm_head']")
            return
        object.__setattr__(self, "backprop", tuple(names) or None)  # a list in YAML and JSON
        if self.backprop is None:
            return
        if self.brake == "rollback":
            problems.append(
                "brake='rollback' reverts steps from their seeds, and those by backprop have none; write brake='warn'"
            )
        if self.lr == AUTO:
            problems.append(
                "lr='auto' tries rates on weights that forward passes move, and backprop would move others meanwhile; "
                "write a rate, or leave it out"
            )

    def _component(self, setting: str, registry: Registry[Any], problems: list[str]) -> Any:
        try:
            return registry.resolve(getattr(self, setting))
        except ValueError as error:
            problems.append(str(error))
            return None

    def _one_of(self, setting: str, choices: tuple[str | None, ...], problems: list[str]) -> bool:
        known = getattr(self, setting) in choices
        if not known:
            wanted = ", ".join(map(repr, choices))
            problems.append(f"{setting}={getattr(self, setting)!r} is not known; write one of {wanted}")
        return known

    def _number(
        self, setting: str, problems: list[str], allowed: Callable[[float], bool], wanted: str, optional: bool = True
    ) -> None:
        value = getattr(self, setting)
        if value is None and optional:
            return
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not allowed(value):
            problems.append(f"{setting}={value!r} must be {wanted}")

    def resolve(self, *, has_optimizer: bool = False, has_rates: bool = False) -> Resolved:
        """The configuration with names and None replaced by components and numbers.

        Args:
            has_optimizer: whether a torch optimizer does the updates.
            has_rates: whether the user has given the learning rates in an optimizer.

        Raises:
            ConfigError: the rule needs an optimizer and there is none, or it would ignore the one there is; or the
                estimator does not work with it.
        """
        estimator = ESTIMATORS.resolve(self.estimator)
        name = ("torch" if has_optimizer else "sgd") if self.rule == "auto" else self.rule
        rule = RULES.resolve(name)
        check_rule(estimator, rule)
        if rule.wants_optimizer and not has_optimizer:
            raise ConfigError(
                [f"rule={rule.name!r} needs an optimizer; pass optimizer=torch.optim.AdamW(model.parameters(), lr=…)"]
            )
        if has_optimizer and not rule.wants_optimizer:
            raise ConfigError(
                [
                    f"an optimizer was passed, but rule={rule.name!r} would ignore it; "
                    "leave out one of them, or write rule='torch'"
                ]
            )
        return Resolved(
            estimator=estimator,
            noise=NOISES.resolve(self.noise),
            rule=rule,
            target=TARGETS.resolve(self.target),
            lr=None if self.lr in (None, AUTO) else float(self.lr),
            eps=None if self.eps is None else float(self.eps),
            num_probes=self._directions(estimator),
            normaliser=self._normaliser(estimator, rule, open=self.lr in (None, AUTO) and not has_rates),
            backend=("triton" if has_triton() else "eager") if self.backend == "auto" else self.backend,
        )

    def _normaliser(self, estimator: Estimator, rule: UpdateRule, *, open: bool) -> str | None:
        if self.normalise is not None:
            return self.normalise if isinstance(self.normalise, str) else GRADIENT if self.normalise else None
        if not open:
            return None
        if rule.scale_free or (estimator.scale_free and not estimator.slopes):
            return None
        if rule.linear and (estimator.two_sided or estimator.slopes):
            return CURVATURE
        return None if estimator.scale_free else GRADIENT

    def unattended(self) -> ZOConfig:
        """The configuration for trainers, whose runs nobody watches: ``brake="auto"`` is "rollback"."""
        return self.replace(brake="warn" if self.backprop else "rollback") if self.brake == AUTO else self

    def replace(self, **changes: Any) -> ZOConfig:
        """A copy with some fields changed.

        Raises:
            ConfigError: a field is not known, or a value is not valid.
        """
        known = [setting.name for setting in fields(self)]
        unknown = [name for name in changes if name not in known]
        if unknown:
            those = f"the settings are {', '.join(known)}"
            raise ConfigError([f"{name!r} is not a setting; {those}{similar(name, known)}" for name in unknown])
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, for JSON or YAML; `from_dict` gives back an equal configuration."""
        registries: dict[str, Registry[Any]] = {
            "estimator": ESTIMATORS,
            "noise": NOISES,
            "rule": RULES,
            "target": TARGETS,
        }
        result: dict[str, Any] = {}
        for setting in fields(self):
            value = getattr(self, setting.name)
            registry = registries.get(setting.name)
            result[setting.name] = (
                value if registry is None or value == "auto" else registry.describe(registry.resolve(value))
            )
        return result

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ZOConfig:
        """The inverse of `to_dict`; fields that are left out take their defaults."""
        return cls().replace(**values)


# For help(), notebooks and LightningCLI, which look for the settings here.
ZOConfig.__doc__ = "\n".join(
    [
        inspect.cleandoc(ZOConfig.__doc__ or ""),
        "",
        "Attributes:",
        *(f"    {setting.name}: {ZOConfig.help_for(setting.name)}" for setting in fields(ZOConfig)),
    ]
)


@dataclass(frozen=True)
class Resolved:
    """A configuration with every name resolved; ``lr`` and ``eps`` are None where the model decides on them."""

    estimator: Estimator
    noise: Noise
    rule: UpdateRule
    target: Target
    lr: float | None
    eps: float | None
    num_probes: int
    normaliser: str | None
    backend: str


def check_rule(estimator: Estimator, rule: UpdateRule) -> None:
    """Raises `ConfigError` if an estimator measures where steps lead, and those of the rule depend on more than it."""
    if estimator.multiples and not isinstance(rule, Sgd):
        raise ConfigError(
            [
                f"estimator={estimator.name!r} measures where a step leads before it is taken, and with "
                f"rule={rule.name!r} that depends on more than the estimate; write rule='sgd', without momentum and "
                "without a torch optimizer, or estimator='spsa'"
            ]
        )


def is_seed(value: object) -> bool:
    """Whether a value can be the seed of a run; what a seed log takes is one."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 128


def is_distance(value: float) -> bool:
    """Whether a number can be the distance of probes from the weights, which is applied in float32."""
    return 0 < value <= FLOAT32_MAX


def has_triton() -> bool:
    """Whether Triton kernels can run here."""
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None
