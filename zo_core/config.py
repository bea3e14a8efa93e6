"""The settings of zeroth-order training: one validated, serialisable object."""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from .errors import ConfigError
from .estimators import ESTIMATORS, Estimator
from .noise import NOISES, LowRank, Noise
from .normaliser import CURVATURE, GRADIENT
from .registry import Registry, similar
from .rules import RULES, Sgd, UpdateRule
from .sizes import parse_bytes
from .targets import TARGETS, Target

BACKENDS = ("auto", "eager", "compile", "triton")
#: As a learning rate: it is found before the first step.
AUTO = "auto"
BRAKES = (AUTO, "rollback", "warn", None)
RANKS = ("directions", "data", "points", None)
OFFLOADS = (None, "cpu", "disk", "auto")


@dataclass(frozen=True)
class ZOConfig:
    """What to measure, along which directions, and how to move.

    Every component is a registered name, a dict ``{"name": ..., **fields}`` or an object; see
    ``list(zo_core.NOISES)`` and its siblings for the names. Each setting is described once, beside its
    default; `help_for` returns the text, and docs/settings.md lists all of them.
    """

    lr: float | str | None = field(
        default=None,
        metadata={
            "help": "Learning rate. None takes the trainer's, and where that is not given either, the default for "
            'normalised steps (see normalise). "auto" finds one by trial runs before the first step; a run of '
            "fewer than 5,120 forwards takes the default."
        },
    )
    eps: float | None = field(
        default=None,
        metadata={
            "help": "Distance of the probes from the weights, in units of the noise. None takes the estimator's "
            'default: 1e-3, and 1e-4 for "fzoo" with a learning rate; 10 times that for LoRA and scales, 100 for '
            "prefix tuning."
        },
    )
    num_probes: int | None = field(
        default=None,
        metadata={
            "help": 'Directions per step. None takes the estimator\'s default: 8 for "fzoo", 30 for "es", 1 for the '
            'others. With n directions, "spsa" runs 2 n forwards per step, "fzoo" n + 1, "es" n or, if it is '
            'antithetic, 2 n, and "conservative" 2 n + 3; "forward_grad" n, at about the time of 3 n.'
        },
    )
    stack_probes: bool = field(
        default=False,
        metadata={
            "help": 'Measure all probes of a step in one forward, which reads each weight once. Needs "low_rank" '
            "noise, and memory for the activations of all probes. What cannot run this way is measured one probe after "
            "another, with a warning. Losses equal those of separate probes up to rounding."
        },
    )
    reuse: bool = field(
        default=False,
        metadata={
            "help": "Compute the layers before the first one that moves once for several probes: frozen early layers, "
            'or noise "one_block", "coordinates" or "sampled". All numbers have the same bits, unless layers depend on '
            "something that cannot be seen; that is only found by checks, which grow rarer. It takes memory for the "
            "result of each call of these layers."
        },
    )
    estimator: str | dict[str, Any] | Estimator = field(
        default="spsa",
        metadata={
            "help": 'How losses become probes: "spsa", "fzoo", "es", "conservative" or "forward_grad". "es" compares a '
            'population of perturbed weights; its fields are shaping ("center", "zscore" or "ranks") and antithetic. '
            '"conservative" is "spsa" that also measures the loss before the step, after it and after the opposite '
            'step, and keeps the best of the three. "forward_grad" is "spsa" with exact slopes, by forward-mode '
            "differentiation."
        },
    )
    maximize: bool = field(
        default=False,
        metadata={
            "help": "Whether the closure returns a score, such as an accuracy or a reward: steps go up, and the loss "
            "of a step is minus its score."
        },
    )
    noise: str | dict[str, Any] | Noise = field(
        default="rademacher",
        metadata={
            "help": 'Distribution of the directions: "rademacher", "gaussian", "low_rank", "sparse" (small weights '
            'only), "sampled" (a random subset of the blocks in each step), "one_block" (one block per direction) or '
            '"coordinates" (one weight per direction, for small models). "sparse", "sampled" and "one_block" restrict '
            "another noise."
        },
    )
    rule: str | dict[str, Any] | UpdateRule = field(
        default="auto",
        metadata={
            "help": 'How probes move the weights: "sgd", "momentum", "sign", or "torch", which leaves the update to a '
            'torch optimizer. "auto" is "torch" if such an optimizer is given, else "sgd". With the field decay_to '
            '({"name": "sgd", "decay_to": "start"}) weight decay pulls to the weights before the first update, of '
            "which a copy is kept, and not to zero."
        },
    )
    target: str | dict[str, Any] | Target = field(
        default="auto",
        metadata={
            "help": 'What may move: "trainable" parameters, the "int4_scales" of a model quantised by bitsandbytes, or '
            'the "torchao_scales" of one quantised by torchao. "auto" takes the scales if the model has such layers '
            "and no trainable adapters, else the trainable parameters."
        },
    )
    weight_decay: float = field(
        default=0.0, metadata={"help": "Decoupled weight decay, as in AdamW; see rule for what it pulls to."}
    )
    normalise: bool | str | None = field(
        default=None,
        metadata={
            "help": "Divide each step's estimate by the root of a running mean of squares, so that a learning rate "
            'carries over between models, tasks and losses. "gradient", or True, takes the projected gradients (MEAZO, '
            'arXiv 2605.03869): the rate is a length, how far a step moves a weight. "curvature" takes the curvature '
            "along the directions, for one forward more (three, if the estimator measures one side alone) in the first "
            "steps and in one of eight later: the rate is a fraction of Newton's step. None is False if a rate "
            'was given. Without one it is "curvature" for "spsa" and "fzoo" with the rules "sgd" and "momentum", False '
            'where the scale of the loss cancels anyway ("zscore", "ranks", "sign"), and else "gradient".'
        },
    )
    backprop: Sequence[str] | None = field(
        default=None,
        metadata={
            "help": 'Names of modules whose weights move by backpropagation instead, or patterns of names ("lm_head", '
            '"model.layers.3?"): the last blocks of a model, whose activations are then kept. All other weights move '
            "by forward passes."
        },
    )
    backprop_lr: float = field(
        default=1e-4,
        metadata={
            "help": "Learning rate of the weights under backprop, whose rule is AdamW. It follows the schedule of the "
            "other learning rate."
        },
    )
    clip: float | None = field(
        default=None,
        metadata={
            "help": 'Largest absolute coefficient of a direction (with "spsa", of the projected gradient). None takes '
            "the target's default: 100 for scales, no bound for others. inf is no bound."
        },
    )
    seed: int | None = field(
        default=None, metadata={"help": "Seed of the directions. None takes the trainer's seed, and 0 in a bare loop."}
    )
    ranks: str | None = field(
        default="directions",
        metadata={
            "help": "What several processes (torchrun, accelerate launch, Lightning's devices) share of a step. With "
            '"directions" each measures num_probes directions of its own on its own batches; with "data" all measure '
            'the same directions, each on its own batches; with "points" the points of a step are dealt out to '
            "processes that have the same batch. None trains a model of its own in each process."
        },
    )
    brake: str | None = field(
        default="auto",
        metadata={
            "help": "What to do when the loss has risen clearly above the best it had, or does not fall because steps "
            'are too long for the noise: "rollback" goes back to the best step, lowers the learning rate and goes on; '
            '"warn" says so; None does nothing. "auto" is "rollback" in the trainers, and "warn" in a bare loop and '
            "with backprop. In the trainers the last step of a run also measures the batches of the first steps again, "
            'and "rollback" goes back if their losses have risen.'
        },
    )
    dropout: bool = field(
        default=False,
        metadata={
            "help": "Run the probes in the modes that the modules are in, so that dropout is on in training mode; all "
            "probes of a step then share their random numbers. BatchNorm statistics stay frozen."
        },
    )
    stochastic_rounding: bool = field(
        default=True,
        metadata={"help": "Round updates of 16-bit weights stochastically. Without it most of them are lost."},
    )
    backend: str = field(
        default="auto",
        metadata={
            "help": 'What computes the noise: "eager" torch, "compile" (torch.compile, faster on a CPU after about '
            '10 s of compilation), "triton" (CUDA), or "auto" (triton on CUDA, else eager). The values are the same to '
            "the last bit."
        },
    )
    offload: str | None = field(
        default=None,
        metadata={
            "help": "Where the repeated layers of the model live between their forwards. None keeps the model where it "
            'is; "cpu" is host memory, "disk" is files. "auto" streams only the layers that do not fit, from files if '
            "offload_dir is given, else from host memory."
        },
    )
    offload_dir: str | None = field(
        default=None, metadata={"help": "Folder of the block files. None makes a temporary one."}
    )
    device_memory: int | str | None = field(
        default=None,
        metadata={
            "help": 'How much of the device the weights may take, in bytes or as in "8GB"; layers that fit are not '
            'streamed. None streams all of them or, with offload "auto", takes what is free and leaves a tenth of the '
            "device, at least 1 GiB, and two copies of the largest layer for the computation."
        },
    )
    device: str | None = field(
        default=None,
        metadata={
            "help": "Where a streamed model computes. None is the trainer's device, and in a bare loop where the "
            "embeddings are."
        },
    )
    blocks: Sequence[str] | None = field(
        default=None,
        metadata={"help": "Names of the streamed modules, or of the containers that hold them. None finds them."},
    )

    def __post_init__(self) -> None:
        problems: list[str] = []
        estimator = self._component("estimator", ESTIMATORS, problems)
        noise = self._component("noise", NOISES, problems)
        self._component("target", TARGETS, problems)
        if self.rule != "auto":
            self._component("rule", RULES, problems)
        if self.lr != AUTO:
            self._number("lr", problems, lambda x: x >= 0, "a number of at least 0, for example 1e-6, or 'auto'")
        self._number("eps", problems, lambda x: x > 0, "a number above 0, for example 1e-3")
        self._number("weight_decay", problems, lambda x: x >= 0, "a number of at least 0", optional=False)
        if self.clip != math.inf:
            self._number("clip", problems, lambda x: x > 0, "a number above 0, or None for the target's default")
        if estimator is not None and self.num_probes is not None:
            least = estimator.min_probes
            if not isinstance(self.num_probes, int) or isinstance(self.num_probes, bool) or self.num_probes < least:
                problems.append(
                    f"num_probes={self.num_probes!r} must be a whole number of at least {least} "
                    f"with estimator {estimator.name!r}"
                )
        if self.seed is not None and (not isinstance(self.seed, int) or isinstance(self.seed, bool)):
            problems.append(f"seed={self.seed!r} must be a whole number, or None for the trainer's seed")
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
        if (
            self.stack_probes is True
            and estimator is not None
            and estimator.multiples
            and self._directions(estimator) > 1
        ):
            problems.append(
                f"stack_probes=True with estimator={estimator.name!r} takes one direction, because it measures "
                "the sum of all directions; write num_probes=1, or leave out stack_probes"
            )
        if self.stack_probes is True and estimator is not None and estimator.differentiates:
            problems.append(
                f"stack_probes=True has no use with estimator={estimator.name!r}, which measures a direction in one "
                "forward; leave it out"
            )
        if self.brake not in BRAKES:
            problems.append(f"brake={self.brake!r} is not known; write one of {', '.join(map(repr, BRAKES))}")
        if self.ranks not in RANKS:
            problems.append(f"ranks={self.ranks!r} is not known; write one of {', '.join(map(repr, RANKS))}")
        if self.reuse is True and (self.stack_probes is True or (estimator is not None and estimator.differentiates)):
            problems.append(
                "reuse=True has no use with stack_probes or estimator='forward_grad', which do not measure probe by "
                "probe; leave out one of them"
            )
        for name in ("maximize", "dropout", "stochastic_rounding", "stack_probes", "reuse"):
            if not isinstance(getattr(self, name), bool):
                problems.append(f"{name}={getattr(self, name)!r} must be True or False")
        if self.stack_probes is True and noise is not None and not isinstance(noise, LowRank):
            problems.append(f"stack_probes=True needs noise='low_rank'; noise={noise.name!r} copies the weights")
        if self.stack_probes is True and self.offload in OFFLOADS[1:]:
            problems.append(
                f"stack_probes=True has no use with offload={self.offload!r}, where all probes share a sweep already; "
                "leave out one of them"
            )
        self._check_offload(problems)
        self._check_backprop(problems)
        if self.backend not in BACKENDS:
            problems.append(f"backend={self.backend!r} is not known; write one of {', '.join(map(repr, BACKENDS))}")
        elif self.backend == "triton" and not has_triton():
            problems.append("backend='triton' needs CUDA and the triton package; write backend='auto'")
        if problems:
            raise ConfigError(problems)

    def _directions(self, estimator: Estimator) -> int:
        return estimator.default_num_probes if self.num_probes is None else self.num_probes

    def _check_offload(self, problems: list[str]) -> None:
        if self.offload not in OFFLOADS:
            problems.append(f"offload={self.offload!r} is not known; write one of {', '.join(map(repr, OFFLOADS))}")
        elif self.offload not in ("disk", "auto") and self.offload_dir is not None:
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
        if isinstance(self.backprop, str) or not all(isinstance(name, str) and name for name in self.backprop or ()):
            problems.append(f"backprop={self.backprop!r} must be several names, for example ['lm_head']")
            return
        object.__setattr__(self, "backprop", tuple(self.backprop or ()) or None)  # a list in YAML and JSON
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

    @classmethod
    def help_for(cls, setting: str) -> str:
        """What a setting is, in a few sentences; for command lines and documentation."""
        return str(cls.__dataclass_fields__[setting].metadata["help"])

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


def has_triton() -> bool:
    """Whether Triton kernels can run here."""
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None
