"""Scales inside weights that torchao has quantised: the codes are fixed, as with bitsandbytes.

The only file that depends on torchao, which is imported when it is used. Such a weight is a tensor subclass, and
its scales are a plain tensor inside it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .base import TARGETS, Slot
from .scales import Scales

#: Weights whose layers compute with the scales in torch's own operations, in any dtype.
FIT = ("IntxUnpackedToInt8Tensor", "Int8Tensor")

#: For each module the weights whose scales move, by name, each with its scales.
_known: WeakKeyDictionary[nn.Module, dict[str, tuple[Any, Tensor]]] = WeakKeyDictionary()


@TARGETS.register
@dataclass(frozen=True)
class TorchaoScales(Scales):
    """The scales of torchao's weight-only quantised weights; codes and zero points never change. Fields as in `Scales`.

    These weights come from `IntxWeightOnlyConfig` and `Int8WeightOnlyConfig`. On entry 16-bit scales become float32,
    with which these layers compute the same values, and hooks make sure that the weights keep them.
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
        for name, module, leaf in found:
            reason = _unfit(getattr(module, leaf))
            if reason is not None:
                raise ModelError(
                    f"{name}.{leaf}".lstrip(".") + f" {reason}; quantise with IntxWeightOnlyConfig or "
                    "Int8WeightOnlyConfig of torchao, or write target='trainable'"
                )
        if not found:
            raise ModelError(
                f"{type(model).__name__} has no weights of torchao, whose scales target='torchao_scales' moves; "
                "call quantize_(model, IntxWeightOnlyConfig(torch.int4)), or write target='trainable'"
            )
        return self.as_slots(
            model,
            ((f"{name}.{leaf}.scale".lstrip("."), own_scales(module, leaf), module) for name, module, leaf in found),
        )

    def relink(self, slots: Iterable[Slot]) -> None:
        for module in {module for slot in slots for module in slot.modules}:
            relink(module)


def has_torchao_weights(model: nn.Module) -> bool:
    """Whether torchao has quantised weights of the model."""
    return any(True for _ in quantised_weights(model))


def quantised_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Modules with their names, each with the name of one of its own parameters that torchao has quantised."""
    library: Any = sys.modules.get("torchao.utils")
    if library is None:
        return
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, library.TorchAOBaseTensor):
                yield name, module, leaf


def _unfit(weight: Tensor) -> str | None:
    """Why the scales of a quantised weight cannot move; None if they can."""
    if any(getattr(weight, name, None) is not None for name in ("activation_quantization", "act_quant_kwargs")):
        return "quantises the inputs of its layer too, so the loss is a step function of the scales before it"
    if type(weight).__name__ not in FIT:
        return f"is a {type(weight).__name__}, whose kernels have not been tried with scales that move"
    return None


def own_scales(module: nn.Module, leaf: str) -> Tensor:
    """The scales of a weight, as a float32 tensor that it keeps from now on; a second call returns the same one."""
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
    """Puts the scales that move back into their weights.

    ``module.to()``, which trainers call even if there is nothing to convert, leaves a weight with new tensors inside,
    and rounds scales to the dtype of the weight. The values stay those of the scales that move; their device becomes
    the one of the weight.
    """
    known = _known.get(module, {})
    for leaf, (weight, scale) in list(known.items()):
        held: Any = getattr(module, leaf, None)
        if held is weight:
            if scale.device != held.scale.device:
                scale.data = scale.data.to(held.scale.device)
            held.scale = scale
        else:
            del known[leaf]


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
    """A hook before a module loads its weights: reassembles those that a safetensors file stores in parts."""
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
                errors.append(f"size mismatch for {prefix}{leaf}.{name}: got {came}, expected {here}")
                return
        state[f"{prefix}{leaf}"] = weight.__tensor_unflatten__(parts, attributes, weight.shape, weight.stride())
