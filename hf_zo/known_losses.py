"""Losses of common trainers whose value is not what they optimise.

Forward-only training sees only the value of a loss. Some losses define their gradient with a
``detach()``: the value of ``ratio * advantage`` with ``ratio = exp(logp - logp.detach())`` is the advantage,
for any weights. Others select or generate what they compare, and the selection depends on the weights.
Trainers and losses are recognised by their class names, so nothing is imported.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from zo_core import ConfigError

logger = logging.getLogger("hf_zo")


@dataclass(frozen=True)
class Known:
    """A loss that raises an error or logs a warning.

    Attributes:
        name: name of a class of the trainer, or of its loss.
        settings: the settings in the message: attributes of the trainer's arguments, or of the loss.
        applies: whether the settings have the problem; called with the trainer, or with the loss and the trainer.
        said: what is wrong and what to write instead.
        refused: whether it is an error; else a warning is logged.
    """

    name: str
    settings: tuple[str, ...]
    applies: Callable[..., bool]
    said: str
    refused: bool = True

    def about(self, name: str, settings: Any) -> str:
        """Returns the message for a class of this name with these settings."""
        came = ", ".join(f"{key}={getattr(settings, key)!r}" for key in self.settings)
        return f"{name} with {came}: {self.said}" if came else f"{name}: {self.said}"


def _keeps_old(trainer: Any) -> bool:
    """Whether log-probabilities from the time of sampling are kept, by the condition of `GRPOTrainer`."""
    args = trainer.args
    every = args.steps_per_generation * trainer.num_iterations
    corrected = getattr(trainer, "use_vllm", False) and getattr(trainer, "vllm_importance_sampling_correction", False)
    return bool(args.gradient_accumulation_steps % every or corrected)


def _detached_factor(trainer: Any) -> bool:
    """Whether the loss has a moving factor without a gradient: cispo and vespo multiply ``A log p`` by one."""
    moving = trainer.loss_type == "vespo" or (trainer.loss_type == "cispo" and trainer.epsilon_high >= 1)
    return moving and "GMPOTrainer" not in _names(trainer) and _keeps_old(trainer)


def _ratio_is_one(trainer: Any) -> bool:
    """Whether the loss is a function of a ratio that is always 1."""
    other = trainer.loss_type in ("cispo", "vespo") or "GMPOTrainer" in _names(trainer)
    return not other and not _keeps_old(trainer)


RATIO = (
    "the ratio of probabilities is 1 by value, whatever the weights are, and only its gradient is not; write "
    "num_iterations=2, which compares with the probabilities at the time of sampling"
)
REWARD = "or train on the reward itself, with ZORewardTrainer"
GENERATES = "generates in training_step, so each probe would be measured on completions of its own"
JUMPS = (
    "in jumps, which have no gradient, and a step whose probes are on both sides of one measures the jump; bound "
    "it with zo_clip"
)
SAMPLED = ("num_iterations", "steps_per_generation")


def _self_distillation(name: str) -> tuple[Known, ...]:
    """The known problems of a trainer that distils a model into itself."""
    return (
        Known(
            name,
            ("distillation_mode",),
            lambda trainer: trainer.args.distillation_mode == "sampled_token",
            "the factor in front of the log-probability has no gradient, but a value that moves with the weights; "
            "write distillation_mode='full_logits' and distillation_alpha=0.5",
        ),
        Known(
            name,
            ("distillation_is_clip", *SAMPLED),
            lambda trainer: trainer.args.distillation_is_clip is not None and _keeps_old(trainer),
            "the importance weight has no gradient, but a value that moves with the weights; write "
            "distillation_is_clip=None",
        ),
        Known(
            name,
            ("teacher_model_kind",),
            lambda trainer: trainer.args.teacher_model_kind == "live",
            "the teacher is the model itself and moves with the probes; write teacher_model_kind='base' or 'ema'",
        ),
        Known(
            name,
            ("distillation_mode",),
            lambda trainer: trainer.args.distillation_mode == "topk_logits",
            f"which tokens are the most probable changes {JUMPS}, or write distillation_mode='full_logits'",
            refused=False,
        ),
    )


TRAINERS = (
    Known("GMPOTrainer", SAMPLED, lambda trainer: not _keeps_old(trainer), f"{RATIO}; {REWARD}"),
    Known(
        "GRPOTrainer",
        ("loss_type", *SAMPLED),
        _ratio_is_one,
        f"{RATIO}, or loss_type='cispo', whose value is right as it is; {REWARD}",
    ),
    Known(
        "GRPOTrainer",
        ("loss_type", *SAMPLED),
        _detached_factor,
        "the factor in front of the log-probability has no gradient, but a value that moves with the weights; write "
        "num_iterations=1 and steps_per_generation=1, where it is constant, or loss_type='dapo'",
    ),
    Known(
        "GRPOTrainer",
        ("top_entropy_quantile",),
        lambda trainer: trainer.top_entropy_quantile < 1.0,
        "which tokens count changes in jumps, which have no gradient; write top_entropy_quantile=1.0",
    ),
    Known(
        "SDPOTrainer",
        ("distillation_weight", *SAMPLED),
        lambda trainer: trainer.args.distillation_weight < 1.0 and not _keeps_old(trainer),
        f"{RATIO} (and distillation_is_clip=None), or distillation_weight=1.0",
    ),
    Known(
        "SFTTrainer",
        ("loss_type",),
        lambda trainer: trainer.args.loss_type == "dft" and trainer.compute_loss_func is None,
        "the value -p log p falls when p falls below 1/e, so training would go backwards; write loss_type='nll'",
    ),
    Known(
        "DPOTrainer",
        ("use_weighting",),
        lambda trainer: bool(trainer.use_weighting),
        "the weights of the pairs have no gradient, but a value that moves with the model; write use_weighting=False",
    ),
    Known("OnlineDPOTrainer", (), lambda trainer: True, f"it {GENERATES}; use RLOOTrainer, which samples beforehand"),
    Known(
        "GKDTrainer",
        ("lmbda",),
        lambda trainer: trainer.lmbda > 0.0,
        f"it {GENERATES}; write lmbda=0.0, or use trl.DistillationTrainer, which samples beforehand",
    ),
    Known(
        "IWOPDTrainer",
        ("distillation_objective",),
        lambda trainer: trainer.args.distillation_objective == "iw_opd" and not trainer.args.use_vllm,
        "the advantages have no gradient, but a value that moves with the weights; write "
        "distillation_objective='jsd', or use_vllm=True, which keeps the probabilities at the time of sampling",
    ),
    *(known for name in ("SDFTTrainer", "SDPOTrainer") for known in _self_distillation(name)),
    Known(
        "KTOTrainer",
        ("loss_type",),
        lambda trainer: bool(trainer.calculate_KL),
        "its KL term has no gradient, but counts in the value; that cancels where desired and undesired rows weigh "
        "the same, and loss_type='apo_zero_unpaired' has no such term",
        refused=False,
    ),
)

LOSSES = (
    Known(
        "",
        ("hardness_mode",),
        lambda loss, trainer: bool(getattr(loss, "hardness_mode", None)) and loss.hardness_strength > 0.0,
        "the penalty of hard negatives has no gradient, but a value that moves with the weights; write "
        "hardness_mode=None",
    ),
    Known(
        "AdaptiveLayerLoss",
        ("kl_temperature",),
        lambda loss, trainer: loss.kl_temperature > 0 and loss.kl_div_weight != 0,
        "the last layer is a teacher without a gradient, but its value moves with the weights; write kl_temperature=0",
    ),
    Known(
        "CSRReconstructionLoss",
        ("beta",),
        lambda loss, trainer: loss.beta != 0,
        "what the auxiliary codes have to explain has no gradient, but a value that moves with the weights; write "
        "CSRLoss(model, beta=0.0)",
    ),
    Known(
        "AdaptiveLayerLoss",
        (),
        lambda loss, trainer: trainer.zo_config.offload is not None,
        "it replaces functions of the model while it runs, and the probes of a streamed model run in turns; leave "
        "out offload",
    ),
    Known(
        "LambdaLoss",
        (),
        lambda loss, trainer: True,
        f"the order of the documents changes its value {JUMPS}",
        refused=False,
    ),
)


def check_loss(trainer: Any) -> None:
    """Checks that the loss of a trainer can be optimised by its value; logs a warning if this is only partly true.

    Raises:
        ConfigError: the loss cannot be optimised by its value; the message lists what to write instead.
    """
    problems = []
    for known, said in _found(trainer):
        if known.refused:
            problems.append(said)
        else:
            logger.warning("%s", said)
    if problems:
        raise ConfigError(problems)


def _found(trainer: Any) -> Iterator[tuple[Known, str]]:
    for known in TRAINERS:
        if known.name in _names(trainer) and _applies(known, trainer):
            yield known, known.about(known.name, trainer.args)
    loss = getattr(trainer, "loss", None)
    given = list(loss.values()) if isinstance(loss, dict) else [loss]
    modules = {id(module): module for each in given if isinstance(each, nn.Module) for module in each.modules()}
    for module in modules.values():
        for known in LOSSES:
            if known.name in {"", *_names(module)} and _applies(known, module, trainer):
                yield known, known.about(type(module).__name__, module)


def _names(instance: Any) -> set[str]:
    return {cls.__name__ for cls in type(instance).__mro__}


def _applies(known: Known, *about: Any) -> bool:
    try:
        return known.applies(*about)
    except AttributeError:  # another version, which does not have that setting
        return False
