"""Low-rank directions for weights that must not be written: quantised ones, or any that should stay unchanged."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from zo_core import ConfigError, LowRank, ModelError, derive_seed
from zo_core.targets import keep_codes_plain

if TYPE_CHECKING:
    from peft import PeftModel

#: Fields of ``LoraConfig`` that `low_rank_adapter` sets itself.
OWN = ("r", "lora_alpha", "use_rslora", "init_lora_weights", "use_dora", "lora_bias", "rank_pattern", "alpha_pattern")


def low_rank_adapter(
    model: nn.Module,
    rank: int = 2,
    *,
    target_modules: str | list[str] = "all-linear",
    seed: int = 0,
    **config: Any,
) -> PeftModel:
    """Adds adapters so that ordinary training uses low-rank directions, on a base that is only read.

    Each linear layer gets a LoRA adapter ``B A / sqrt(rank)``. A holds signs and is frozen, B is zero and
    trained. With the default noise a probe then perturbs a weight by ``eps U A / sqrt(rank)``, U of signs,
    which is what ``LowRank(rank, refresh=None)`` does with ``V = A^T``; the same learning rates fit. The base
    may be anything that PEFT puts LoRA adapters on: float weights, 4-bit ones of bitsandbytes, torchao, GPTQ.

    Args:
        model: the base model, changed in place: PEFT wraps its layers.
        rank: r, at least 1.
        target_modules: the layers, as in PEFT's ``LoraConfig``; by default all linear ones except the
            head of a language model.
        seed: determines A, together with the names of the layers. No random generator changes.
        **config: other fields of ``LoraConfig``, for example ``task_type="CAUSAL_LM"``.

    Returns:
        The model with adapters, for `ZOTrainer` or `ZeroOrder`. ``save_pretrained`` writes an ordinary adapter.

    Raises:
        ConfigError: the rank or a field is not valid, peft is too old, or layers are not linear.
        ModelError: the model already has adapters.
    """
    adapted, layers = frozen_adapter(model, rank, target_modules, config, "low_rank_adapter")
    set_signs(layers, rank, seed)
    return adapted


def set_signs(layers: Mapping[str, Any], rank: int, seed: int) -> None:
    """Fills A of these layers with the signs that a seed and their names determine."""
    base = derive_seed(seed, 0, 0)
    for name, layer in layers.items():
        down: Any = layer.lora_A["default"].weight
        with torch.no_grad():
            down.copy_(LowRank(rank).rights((base,), name, torch.Size([1, down.shape[1]]), down.device))


def frozen_adapter(
    model: nn.Module, rank: int, target_modules: str | list[str], config: dict[str, Any], by: str
) -> tuple[PeftModel, dict[str, Any]]:
    """Adds LoRA adapters ``B A / sqrt(rank)`` whose A stays frozen, for the caller to set; B is zero.

    Args:
        model, rank, target_modules, config: as for `low_rank_adapter`.
        by: name of the caller, for errors.

    Returns:
        The model with adapters, and its layers with adapters by their names in the base model.

    Raises:
        ConfigError, ModelError: as for `low_rank_adapter`.
    """
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.tuners.lora import LoraLayer

    problems = [f"{key}= is set by {by}; leave it out" for key in OWN if key in config]
    try:
        LowRank(rank)
    except ValueError as error:
        problems.append(str(error))
    if not hasattr(LoraLayer, "frozen_peft_weight_names"):
        problems.append("this version of peft cannot keep a part of an adapter frozen; pip install -U peft")
    if problems:
        raise ConfigError(problems)
    if isinstance(model, PeftModel) or getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError("model has adapters already; pass the base model, which model.unload() returns")
    keep_codes_plain(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    lora = LoraConfig(r=rank, lora_alpha=1, use_rslora=True, target_modules=target_modules, **config)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft reads an attribute that transformers has renamed; users can do nothing about it.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        adapted = get_peft_model(model, lora)
    inside: Any = adapted.get_base_model()
    layers = {name: layer for name, layer in inside.named_modules() if isinstance(layer, LoraLayer)}
    other = [name for name, layer in layers.items() if "default" not in layer.lora_A]
    if other:
        adapted.unload()
        for parameter in trainable:
            parameter.requires_grad_(True)
        raise ConfigError([f"{name} is no linear layer; leave it out of target_modules" for name in other])
    for layer in layers.values():
        # Otherwise PEFT makes A trainable when it activates the adapter: in set_adapter, and after disable_adapter.
        layer.frozen_peft_weight_names = {"default": ("lora_A",)}
        layer.lora_A["default"].weight.requires_grad_(False)
    return adapted, layers
