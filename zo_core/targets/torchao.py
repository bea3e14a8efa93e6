"""Scales inside of weights that torchao has quantised: the codes stay, as with bitsandbytes.

The one file that knows torchao, which is imported at use. Such a weight is a tensor subclass, and its scales
are a plain tensor inside of it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .base import TARGETS, Slot
from .scales import Scales

#: Of each module the weights whose scales move, by name, each with its scales.
_known: WeakKeyDictionary[nn.Module, dict[str, tuple[Any, Tensor]]] = WeakKeyDictionary()


@TARGETS.register
@dataclass(frozen=True)
class TorchaoScales(Scales):
    """The scales of torchao's weight-only quantised weights; codes and zero points never change. Fields as in `Scales`.

    Made for `IntxWeightOnlyConfig` with int4; any weight of torchao that keeps its scales in ``scale``, and
    leaves the inputs of its layer as they are, is taken. On entry 16-bit scales become float32, with which
    the layers compute the same values, and hooks see to it that the weights keep them.
    """

    name: ClassVar[str] = "torchao_scales"

    def slots(self, model: nn.Module) -> list[Slot]:
        try:
            import torchao  # noqa: F401
        except ImportError as error:
            raise ModelError(
                "target='torchao_scales' needs the package torchao; pip install 'zo-trainer[torchao]', or write "
                "target='trainable'"
            ) from error
        found = list(quantised_weights(model))
        rounding = [f"{name}.{leaf}".lstrip(".") for name, module, leaf in found if _rounds_inputs(module, leaf)]
        if rounding:
            raise ModelError(
                f"{rounding[0]} quantises the inputs of its layer too, so the loss is a step function of the scales "
                "before it; use a weight-only configuration of torchao, or write target='trainable'"
            )
        if not found:
            raise ModelError(
                f"{type(model).__name__} has no weights of torchao with scales, which target='torchao_scales' moves; "
                "call quantize_(model, IntxWeightOnlyConfig(torch.int4)), or write target='trainable'"
            )
        return self.as_slots(
            model,
            ((f"{name}.{leaf}.scale".lstrip("."), own_scales(module, leaf), module) for name, module, leaf in found),
        )


def has_torchao_weights(model: nn.Module) -> bool:
    """Whether torchao has quantised weights of the model."""
    return any(True for _ in quantised_weights(model))


def quantised_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Modules by name, with the name of a parameter of theirs that torchao has quantised and that has scales."""
    library: Any = sys.modules.get("torchao.utils")
    if library is None:
        return
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, library.TorchAOBaseTensor) and isinstance(_scale(parameter), Tensor):
                yield name, module, leaf


def _scale(weight: Any) -> Any:
    return getattr(weight, "scale", None)


def _rounds_inputs(module: nn.Module, leaf: str) -> bool:
    weight = getattr(module, leaf)
    return any(getattr(weight, name, None) is not None for name in ("activation_quantization", "act_quant_kwargs"))


def own_scales(module: nn.Module, leaf: str) -> Tensor:
    """The scales of a weight as a float32 tensor that it keeps from now on; a second call returns the same one."""
    relink(module)
    weight: Any = getattr(module, leaf)
    scale: Tensor = weight.scale
    if scale.dtype != torch.float32 or scale.is_inference():
        with torch.inference_mode(False):
            scale = weight.scale = scale.to(torch.float32, copy=True)
    if module not in _known:
        module.register_forward_pre_hook(relink)
        module.register_state_dict_pre_hook(relink)
        module.register_load_state_dict_pre_hook(load_weights)
    _known.setdefault(module, {})[leaf] = weight, scale
    return scale


def relink(module: nn.Module, *_: Any) -> None:
    """Gives weights the scales again that move.

    ``module.to()``, which trainers call even where nothing is to be moved, leaves a weight with new tensors inside,
    and rounds scales to the dtype of the weight.
    """
    for leaf, (weight, scale) in _known.get(module, {}).items():
        held: Any = getattr(module, leaf, None)
        if held is weight:
            held.scale = scale


def load_weights(
    module: nn.Module,
    state: dict[str, Tensor],
    prefix: str,
    _meta: Any,
    _strict: Any,
    _missing: Any,
    _extra: Any,
    errors: list[str],
) -> None:
    """Before a module loads its weights: puts those together that a safetensors file has in parts."""
    relink(module)
    for leaf, (weight, _) in _known.get(module, {}).items():
        names, attributes = weight.__tensor_flatten__()
        parts = {name: state[key] for name in names if (key := f"{prefix}_{leaf}_{name}") in state}
        if len(parts) < len(names):
            continue
        for name, value in parts.items():
            state.pop(f"{prefix}_{leaf}_{name}")
            if value.shape != getattr(weight, name).shape:
                came, here = list(value.shape), list(getattr(weight, name).shape)
                errors.append(f"size mismatch for {prefix}{leaf}.{name}: {came} came for {here}")
                return
        state[f"{prefix}{leaf}"] = weight.__tensor_unflatten__(parts, attributes, weight.shape, weight.stride())
