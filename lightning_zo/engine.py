"""Builds the engine from the optimizer that ``configure_optimizers`` returned."""

from __future__ import annotations

import inspect
import logging
import os
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities import GradClipAlgorithmType, rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden

from zo_core import NOISES, RULES, TARGETS, ConfigError, LowRank, Momentum, ZeroOrder, ZOConfig, ZOOptimizer
from zo_core.checkpoint import FrontEnd
from zo_core.defaults import default_eps

from .sgd import SGDFace, is_plain

logger = logging.getLogger("lightning_zo")

FRONT_END = FrontEnd(
    weights_alone="load the weights alone, with module.load_state_dict(torch.load(path)['state_dict']), and fit "
    "without ckpt_path",
    same_optimizer="return the optimizer of that run from configure_optimizers",
    without_lr="return zo_core.ZOOptimizer(self.parameters()), which needs none",
)

#: Hooks that change a step with gradients, with the reason why they are not called.
WITHOUT_USE = {
    "backward": "there is no backward pass",
    "configure_gradient_clipping": "there are no gradients; ZOConfig(clip=...) bounds the projected gradient",
    "optimizer_zero_grad": "there are no gradients, and a step forgets what another one measured; "
    "Trainer(accumulate_grad_batches=...) measures several batches for one step",
}


def build(module: LightningModule, optimizer: torch.optim.Optimizer, config: ZOConfig) -> ZeroOrder:
    """Makes an engine that moves the parameters of ``optimizer`` with its hyperparameters.

    Args:
        module: the model.
        optimizer: a `ZOOptimizer` is used directly; a plain SGD passes its hyperparameters to the engine's own
            rules; any other optimizer gets the gradient estimate in ``.grad``.
        config: the settings; ``lr`` and ``weight_decay`` belong in the optimizer.

    Raises:
        ConfigError: settings, optimizer and offload do not fit together.
    """
    _check_scales(module, optimizer, config)
    if isinstance(optimizer, ZOOptimizer):
        return ZeroOrder(module, config, optimizer=optimizer)
    fused = config.rule == "auto" or not RULES.resolve(config.rule).wants_optimizer
    if is_plain(optimizer) and fused:
        known = config.resolve()
        eps = default_eps(known.estimator, module, known.target.slots(module)) if known.eps is None else known.eps
        face = SGDFace(optimizer, eps)
        rule = _rule(face.beta, config)
        return ZeroOrder(module, config.replace(rule=rule, eps=None), optimizer=face)
    if config.offload is not None:
        raise ConfigError(
            [
                f"configure_optimizers returned a {type(optimizer).__name__}, which looks at whole gradients, and "
                f"offload={config.offload!r} has the weights of one layer at a time; return "
                "zo_core.ZOOptimizer(self.parameters(), lr=1e-6) or torch.optim.SGD without nesterov or dampening, "
                "or use strategy='zo'"
            ]
        )
    return ZeroOrder(module, config, optimizer=optimizer)


def _check_scales(module: LightningModule, optimizer: torch.optim.Optimizer, config: ZOConfig) -> None:
    """Checks that the optimizer holds the quantisation scales, which ``self.parameters()`` does not return."""
    target = TARGETS.resolve(config.target).chosen(module)
    if not target.of_quantised:
        return
    moving = {id(tensor) for slot in target.slots(module) for tensor in slot.tensors}
    if not any(id(tensor) in moving for group in optimizer.param_groups for tensor in group["params"]):
        raise ConfigError(
            [
                f"configure_optimizers returned an optimizer without the quantisation scales, which "
                f"target={target.name!r} moves; return zo_core.ZOOptimizer([slot.tensor for slot in "
                f"zo_core.{type(target).__name__}().slots(self)], lr=1e-2), or write target='trainable' to move the "
                "optimizer's own parameters"
            ]
        )


def _rule(momentum: float, config: ZOConfig) -> Any:
    if config.rule == "auto":
        return Momentum(momentum) if momentum else "sgd"
    if momentum:
        raise ConfigError(
            [
                f"rule={config.rule!r} was given together with SGD(momentum={momentum:g}); leave out the rule, or "
                "write momentum=0.0"
            ]
        )
    if RULES.resolve(config.rule).anchored:
        raise ConfigError(
            [
                f"rule={config.rule!r} keeps the weights of the start, for which checkpoints of a torch SGD have no "
                "place; return zo_core.ZOOptimizer(self.parameters(), lr, weight_decay=...) from configure_optimizers"
            ]
        )
    return config.rule


def settings(trainer: Trainer, config: ZOConfig, device: torch.device) -> ZOConfig:
    """Returns the configuration; device, seed and clipping come from the trainer where the configuration sets none.

    Raises:
        ConfigError: clipping is set in both.
    """
    config = config.unattended()
    given = os.environ.get("PL_GLOBAL_SEED")
    seed = int(given) if config.seed is None and given is not None else config.seed
    if config.offload is not None and config.device is None:
        config = config.replace(device=str(device))
    bound = trainer.gradient_clip_val
    if not bound or config.backprop is not None:  # then it bounds the gradient of the weights under backprop
        return config.replace(seed=seed)
    if config.clip is not None:
        raise ConfigError(
            [f"clip={config.clip:g} was given together with gradient_clip_val={bound:g}; leave out one of them"]
        )
    rank_zero_info(
        f"gradient_clip_val={bound:g} bounds the projected gradient of each direction: there is no gradient whose "
        "norm or values could be clipped"
    )
    return config.replace(seed=seed, clip=float(bound))


def check(trainer: Trainer, module: LightningModule, config: ZOConfig) -> None:
    """Checks that a module and its trainer work with probes; logs a warning for hooks without effect.

    Raises:
        ConfigError: they cannot work; the message lists all problems.
    """
    name = type(module).__name__
    problems = []
    if not module.automatic_optimization:
        problems.append(
            f"{name}.automatic_optimization is False, but a zeroth-order step has no backward pass to call; leave it "
            "True and return the loss from training_step, or write the loop yourself with zo_core.ZeroOrder"
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        problems.append(
            f"{name}.training_step takes dataloader_iter, but it runs several times on each batch; take batch instead"
        )
    if config.backprop is not None:
        problems += _of_gradients(trainer)
    if config.offload is not None:
        averaging = (StochasticWeightAveraging, WeightAveraging)
        problems += [
            f"{type(callback).__name__} reads weights behind the strategy's back, and those of streamed layers are "
            "elsewhere; leave it out, or use strategy='zo'"
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, averaging)
        ]
    if config.offload is not None or isinstance(NOISES.resolve(config.noise), LowRank):
        problems += [
            "ModelPruning compares weights, and with offload or noise='low_rank' those in memory are not up to date; "
            "leave it out, or use strategy='zo' with another noise"
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, ModelPruning)
        ]
    if problems:
        raise ConfigError(problems)
    for hook, why in WITHOUT_USE.items():
        if is_overridden(hook, module):
            logger.warning("%s.%s has no effect: %s", name, hook, why)


def _of_gradients(trainer: Trainer) -> list[str]:
    """What a trainer would do to gradients that those of ``backprop`` do not allow."""
    problems = []
    if str(trainer.precision).startswith("16"):
        problems.append(
            f"precision={trainer.precision!r} with backprop: gradients in float16 underflow without a scaler; write "
            "'bf16-mixed'"
        )
    if trainer.gradient_clip_val and trainer.gradient_clip_algorithm == GradClipAlgorithmType.VALUE:
        problems.append(
            "gradient_clip_algorithm='value' with backprop: only the norm of the gradient is bounded; leave it out"
        )
    return problems
