"""Training arguments with the ``zo_*`` settings, for scripts and `HfArgumentParser`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from zo_core import ConfigError, ZOConfig
from zo_core.checkpoint import FrontEnd
from zo_core.config import AUTO

PREFIX = "zo_"
#: Fields whose name in `ZOConfig` is not the field name without the prefix.
RENAMED = {"zo_learning_rate": "lr"}


def _metadata(setting: str) -> dict[str, str]:
    """The help text that `HfArgumentParser` shows for a field: that of the setting in `ZOConfig`."""
    return {"help": ZOConfig.help_for(setting)}


@dataclass
class ZOArguments:
    """The ``zo_*`` fields, to combine with other training arguments:

        @dataclass
        class ZOSFTConfig(ZOArguments, SFTConfig): ...

    Each field sets the setting of that name in `zo_core.ZOConfig`; ``zo_learning_rate`` sets ``lr``. There is no
    field for ``weight_decay``, which is the trainer's own argument; ``zo_log`` only concerns the trainer. A
    ``learning_rate`` that is left out stays open, unlike the other arguments' own default, which is for
    backpropagation.
    """

    zo_estimator: str = field(default="spsa", metadata=_metadata("estimator"))
    zo_maximize: bool = field(default=False, metadata=_metadata("maximize"))
    zo_learning_rate: str | None = field(default=None, metadata=_metadata("lr"))
    zo_eps: float | None = field(default=None, metadata=_metadata("eps"))
    zo_num_probes: int | None = field(default=None, metadata=_metadata("num_probes"))
    zo_stack_probes: bool = field(default=False, metadata=_metadata("stack_probes"))
    zo_reuse: bool = field(default=False, metadata=_metadata("reuse"))
    zo_noise: str = field(default="rademacher", metadata=_metadata("noise"))
    zo_rule: str = field(default="auto", metadata=_metadata("rule"))
    zo_target: str = field(default="auto", metadata=_metadata("target"))
    zo_normalise: str | None = field(default=None, metadata=_metadata("normalise"))
    zo_backprop: list[str] | None = field(default=None, metadata=_metadata("backprop"))
    zo_backprop_lr: float = field(default=1e-4, metadata=_metadata("backprop_lr"))
    zo_clip: float | None = field(default=None, metadata=_metadata("clip"))
    zo_seed: int | None = field(default=None, metadata=_metadata("seed"))
    zo_brake: str | None = field(default="auto", metadata=_metadata("brake"))
    zo_ranks: str | None = field(default="directions", metadata=_metadata("ranks"))
    zo_dropout: bool = field(default=False, metadata=_metadata("dropout"))
    zo_stochastic_rounding: bool = field(default=True, metadata=_metadata("stochastic_rounding"))
    zo_backend: str = field(default="auto", metadata=_metadata("backend"))
    zo_offload: str | None = field(default=None, metadata=_metadata("offload"))
    zo_offload_dir: str | None = field(default=None, metadata=_metadata("offload_dir"))
    zo_device_memory: str | None = field(default=None, metadata=_metadata("device_memory"))
    zo_device: str | None = field(default=None, metadata=_metadata("device"))
    zo_blocks: list[str] | None = field(default=None, metadata=_metadata("blocks"))
    learning_rate: float = field(  # None until a user gives one; the type is that of all training arguments
        default=None,  # type: ignore[assignment]
        metadata={"help": "The initial learning rate. None takes the default for normalised steps, see zo_normalise."},
    )
    max_grad_norm: float = field(
        default=0.0,
        metadata={
            "help": "Bounds the norm of the gradient of weights under zo_backprop. No effect on others: see zo_clip."
        },
    )
    zo_log: bool = field(
        default=True,
        metadata={
            "help": "Write every step to seedlog.zo in the output folder (24 bytes each with one direction; 32 if "
            "steps are normalised)."
        },
    )

    def __post_init__(self) -> None:
        if str(self.learning_rate) == AUTO:
            raise ConfigError(
                ["learning_rate='auto' must be a number; write zo_learning_rate='auto' to have the rate found"]
            )
        after = getattr(super(), "__post_init__", None)
        if after is not None:
            after()

    def zo_settings(self) -> dict[str, Any]:
        """Returns the ``zo_*`` fields that differ from their defaults, by their names in `ZOConfig`."""
        return {
            SETTINGS[f.name]: _read(getattr(self, f.name)) if f.name in MIXED else getattr(self, f.name)
            for f in fields(ZOArguments)
            if f.name in SETTINGS and getattr(self, f.name) != f.default
        }

    def zo_given(self) -> list[str]:
        """Returns the names of the ``zo_*`` fields that differ from the defaults of these arguments' class."""
        return [f.name for f in fields(self) if f.name in SETTINGS and getattr(self, f.name) != f.default]

    def to_zo_config(self) -> ZOConfig:
        """Returns the settings as a `ZOConfig`.

        Raises:
            ConfigError: settings are not valid; the message lists all of them.
        """
        try:
            return ZOConfig(**self.zo_settings())
        except ConfigError as error:
            names = {setting: name for name, setting in SETTINGS.items()}
            said = re.compile(rf"\b({'|'.join(names)})(?==)")
            raise ConfigError([said.sub(lambda found: names[found[1]], each) for each in error.problems]) from None


#: The settings in `ZOConfig` that the fields set, by field.
SETTINGS = {
    f.name: RENAMED.get(f.name, f.name.removeprefix(PREFIX))
    for f in fields(ZOArguments)
    if f.name.startswith(PREFIX) and f.name != "zo_log"
}


#: Fields that take a text or another value, which is a text on a command line.
MIXED = ("zo_learning_rate", "zo_normalise")


def _read(text: Any) -> Any:
    """The number or truth value in a text; other values as they are."""
    if not isinstance(text, str):
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return float(text)
    except ValueError:
        return text


@dataclass
class ZOTrainingArguments(ZOArguments, TrainingArguments):
    """`TrainingArguments` with the ``zo_*`` fields, and a learning rate that is found if none is given."""


def front_end(args: TrainingArguments, config: ZOConfig | None) -> FrontEnd:
    """Returns the names under which the user of a trainer has set the settings, for messages.

    Args:
        args: arguments of the trainer.
        config: the value of ``zo_config``.
    """
    names: dict[str, str] = {}
    own = args if config is None and isinstance(args, ZOArguments) else None
    if own is not None:
        names |= {setting: name for name, setting in SETTINGS.items()}
        if own.zo_seed is None:
            names["seed"] = "seed"
    lr = own.zo_learning_rate if own is not None else None if config is None else config.lr
    if lr in (None, AUTO):
        names["lr"] = "learning_rate"
    rule = "zo_config=ZOConfig(rule='torch')" if own is None else "zo_rule='torch'"
    return FrontEnd(
        names,
        weights_alone="load the weights alone, with from_pretrained(checkpoint), and call train() without "
        "resume_from_checkpoint",
        same_optimizer=f"write {rule} with the optim=... of that run",
        without_lr="leave it out" if isinstance(args, ZOArguments) else "pass ZOTrainingArguments without one",
    )
