"""What can be set, with what each setting is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .estimators import Estimator
from .noise import Noise
from .rules import UpdateRule
from .targets import Target


@dataclass(frozen=True)
class Settings:
    """The settings, each described beside its default; nothing is checked here."""

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

    @classmethod
    def help_for(cls, setting: str) -> str:
        """What a setting is, in a few sentences; for command lines and documentation."""
        return str(cls.__dataclass_fields__[setting].metadata["help"])
