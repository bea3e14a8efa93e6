"""Quantisation scales of 4-bit layers: the codes are fixed, their scales are the continuous parameters.

The only file that depends on bitsandbytes, which is imported when it is used. QZO, arXiv 2505.13430.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .base import TARGETS, Slot
from .scales import Scales

logger = logging.getLogger(__name__)

#: For each module its `QuantState` and the scales in it that move.
_known: WeakKeyDictionary[nn.Module, tuple[Any, Tensor]] = WeakKeyDictionary()


@TARGETS.register
@dataclass(frozen=True)
class Int4Scales(Scales):
    """The scales of bitsandbytes' 4-bit layers (nf4 and fp4); the codes never change. Fields as in `Scales`.

    On entry double-quantised scales are replaced, once, by their float32 values, which is what
    bitsandbytes computes with anyway, and its repacking of codes for CPUs with AVX512-BF16, which
    rounds the scales to bf16, is switched off.
    """

    name: ClassVar[str] = "int4_scales"

    def slots(self, model: nn.Module) -> list[Slot]:
        layers = list(quantised_layers(model, _bitsandbytes()))
        if not layers:
            raise ModelError(
                f"{type(model).__name__} has no 4-bit layers of bitsandbytes, whose scales target='int4_scales' moves"
                f"{_eight_bit(model)}; load it with BitsAndBytesConfig(load_in_4bit=True), or write target='trainable'"
            )
        keep_codes_plain(model)
        if not self.others:
            for _, layer in layers:
                layer.settle_bias()
        return self.as_slots(model, ((name, layer.float_scales(), layer.module) for name, layer in layers))

    def relink(self, slots: Iterable[Slot]) -> None:
        for module in {module for slot in slots for module in slot.modules}:
            relink(module)


def has_quantised_layers(model: nn.Module) -> bool:
    """Whether bitsandbytes has quantised layers of the model, to 4 or 8 bits."""
    library = sys.modules.get("bitsandbytes")
    return library is not None and (any(True for _ in quantised_layers(model, library)) or bool(_eight_bit(model)))


def keep_codes_plain(model: nn.Module) -> None:
    """Prevents the repacking for CPUs with AVX512-BF16 that the first forward in eval mode would do.

    Repacking replaces codes unnoticed by the code that streams them, and rounds scales to bf16. Layers
    that are already repacked are unpacked. Loading a state dict, scales included, works from now on.
    """
    library = sys.modules.get("bitsandbytes")
    if library is None:
        return
    layers = [layer for _, layer in quantised_layers(model, library) if layer.weight is not None]
    rounded = sum(layer.is_packed() for layer in layers)
    if rounded:
        logger.warning(
            "a forward in eval mode has rounded the scales of %d 4-bit layers to bf16, which bitsandbytes does on CPUs "
            "with AVX512-BF16; they are used as they are now. To start from the exact ones, make the trainer before "
            "the first forward",
            rounded,
        )
    for layer in layers:
        layer.keep_plain()
    accept_scales(model, library)


def check_dequantised(model: nn.Module) -> None:
    """Logs a warning if bitsandbytes computes with wrong values of some 4-bit weights.

    Its blocks of codes go on from one row to the next, but its code for AVX-512 (0.50) begins a block with each row,
    which is another one if the size of a row is no multiple of the size of a block.
    """
    library = sys.modules.get("bitsandbytes")
    for name, layer in () if library is None else quantised_layers(model, library):
        state = _state(layer.module)
        if state is None or state.absmax.device.type != "cpu" or state.shape[-1] % state.blocksize == 0:
            continue
        if not _right_in_rows(state.shape[-1], state.blocksize, state.quant_type):
            logger.warning(
                "on a CPU, bitsandbytes computes with wrong values of %s and layers like it, whose %d columns are no "
                "multiple of the block size, %d; train on a GPU, name such layers in llm_int8_skip_modules of "
                "BitsAndBytesConfig, or take a model with other widths",
                name.removesuffix(".absmax"),
                state.shape[-1],
                state.blocksize,
            )
        return


def _right_in_rows(columns: int, blocksize: int, quant_type: str) -> bool:
    """Whether a matrix with rows of this size has the values that it has as one long row."""
    quantise = _bitsandbytes().functional.quantize_4bit
    values = torch.arange(2.0 * columns).view(2, columns)
    codes, state = quantise(values, blocksize=blocksize, quant_type=quant_type)
    dequantise = _bitsandbytes().functional.dequantize_4bit
    in_rows = dequantise(codes, state)
    state.shape = torch.Size((1, values.numel()))
    return torch.equal(in_rows.flatten(), dequantise(codes, state).flatten())


class Layer:
    """A 4-bit tensor of bitsandbytes.

    Args:
        module: the module whose forward dequantises it.
        weight: holds the codes and the `QuantState`; None if ``module`` holds the state itself.
    """

    def __init__(self, module: Any, weight: Any = None):
        self.module, self.weight = module, weight

    def is_packed(self) -> bool:
        """Whether bitsandbytes has repacked the codes for this CPU."""
        return bool(getattr(getattr(self.weight, "quant_state", None), "packing_format_for_cpu", False))

    def float_scales(self) -> Tensor:
        """The scales as float32, stored in the layer; a second call returns the same tensor, also after a move."""
        relink(self.module)
        state = _state(self.module)
        scales = own_float_scales(state)
        _known[self.module] = state, scales
        return scales

    def settle_bias(self) -> None:
        """Casts a frozen bias to the compute dtype now; bitsandbytes does so, in place, at the first forward."""
        bias, dtype = getattr(self.module, "bias", None), getattr(self.module, "compute_dtype", None)
        if self.weight is not None and bias is not None and dtype is not None:
            bias.data = bias.data.to(dtype)

    def keep_plain(self) -> None:
        """Prevents or undoes the repacking of this layer; see `keep_codes_plain`."""
        module, weight = self.module, self.weight
        if getattr(weight, "quant_state", None) is None:  # lost in a conversion; the module has another reference
            if getattr(module, "quant_state", None) is None:
                raise ModelError("a 4-bit layer is not quantised yet; move the model first: model.to('cpu')")
            _bitsandbytes().nn.modules.fix_4bit_weight_quant_state_from_module(module)
            weight = self.weight = module.weight
        module.support_avx512bf16_for_cpu = False
        module.quant_state = state = weight.quant_state
        if self.is_packed():
            packed = state.absmax
            state.original_nested = False  # or they would be quantised again
            unpack = _bitsandbytes().functional._convert_weight_packed_for_cpu_inverse
            weight.data, _ = unpack(weight.data, state)
            state.absmax = packed.T.reshape(-1).to(torch.float32, copy=True)
            state.nested, state.state2, state.offset = False, None, None


def _state(module: Any) -> Any:
    """The `QuantState` that a layer or a parametrisation computes with."""
    weight_state = getattr(getattr(module, "weight", None), "quant_state", None)
    return getattr(module, "quant_state", None) if weight_state is None else weight_state


def relink(module: nn.Module) -> None:
    """Puts the scales that move back into their layer, with the values and on the device that these have there.

    ``module.to()`` gives the layer another tensor of scales, and the one that moves would no longer be used.
    """
    if module not in _known:
        return
    state, scales = _known[module]
    if state.absmax is scales:
        return
    if _state(module) is not state:  # a layer of other codes, whose scales are not those of the slot
        del _known[module]
        return
    with torch.inference_mode(False), torch.no_grad():
        scales.data = state.absmax.to(torch.float32, copy=state.absmax.is_inference())
    state.absmax = scales


def move_scales(module: nn.Module, device: torch.device) -> None:
    """Moves what a 4-bit layer has beside its codes, where these are streamed and `Module.to` must not see them."""
    state = _state(module)
    if hasattr(state, "absmax"):
        state.to(device)
        relink(module)


def own_float_scales(state: Any) -> Tensor:
    """The scales of a `QuantState`, which stores them as plain float32 values from now on."""
    with torch.inference_mode(False), torch.no_grad():
        if state.nested:
            dequantise = _bitsandbytes().functional.dequantize_blockwise
            state.absmax = dequantise(state.absmax, state.state2) + state.offset
            state.nested, state.state2, state.offset = False, None, None
        if state.absmax.dtype != torch.float32 or state.absmax.is_inference():
            state.absmax = state.absmax.to(torch.float32, copy=True)
    return state.absmax


def quantised_layers(model: nn.Module, library: Any) -> Iterator[tuple[str, Layer]]:
    """The 4-bit tensors of a model with the names of their scales in its state dict."""
    parametrize = getattr(library.nn, "parametrize", None)
    parametrization = getattr(parametrize, "Bnb4bitParametrization", ())
    for name, module in model.named_modules():
        if isinstance(module, library.nn.Linear4bit):
            yield f"{name}.weight.absmax".lstrip("."), Layer(module, module.weight)
        elif isinstance(module, parametrization):
            yield f"{name}.absmax", Layer(module)


def load_layer(
    module: Any,
    state: dict[str, Tensor],
    prefix: str,
    _meta: Any,
    _strict: Any,
    _missing: Any,
    _extra: Any,
    errors: Any,
) -> None:
    """A hook before a 4-bit layer loads its codes: takes its scales out of the state."""
    _take_scales(module.weight.quant_state, state, f"{prefix}weight", errors)


def load_fused(
    module: Any,
    state: dict[str, Tensor],
    prefix: str,
    _meta: Any,
    _strict: Any,
    _missing: Any,
    _extra: Any,
    errors: Any,
) -> None:
    """As `load_layer`, for parametrised weights, whose codes ``state_dict`` names after the weight."""
    for name, (parametrisation, *_) in module.parametrizations.items():
        if hasattr(parametrisation, "quant_state") and f"{prefix}{name}" in state:
            state[f"{prefix}parametrizations.{name}.original"] = state.pop(f"{prefix}{name}")
            _take_scales(parametrisation.quant_state, state, f"{prefix}{name}", errors)


def _take_scales(into: Any, state: dict[str, Tensor], name: str, errors: list[str]) -> None:
    found = {key.removeprefix(f"{name}."): state.pop(key) for key in list(state) if key.startswith(f"{name}.")}
    if "absmax" not in found:
        return
    scales = own_float_scales(into)
    values = own_float_scales(_bitsandbytes().functional.QuantState.from_dict(found, device=scales.device))
    if values.shape != scales.shape:
        errors.append(f"size mismatch for {name}.absmax: got {list(values.shape)}, expected {list(scales.shape)}")
        return
    with torch.no_grad():
        scales.copy_(values)


def accept_scales(model: nn.Module, library: Any) -> None:
    """Makes ``load_state_dict`` accept what ``state_dict`` returns; bitsandbytes ignores or refuses scales there."""
    for name, layer in quantised_layers(model, library):
        if layer.weight is not None:
            owner, hook = layer.module, load_layer
        else:
            owner, hook = model.get_submodule(name.rpartition("parametrizations.")[0].rstrip(".")), load_fused
        if hook not in (getattr(known, "hook", known) for known in owner._load_state_dict_pre_hooks.values()):
            owner.register_load_state_dict_pre_hook(hook)


def _bitsandbytes() -> ModuleType:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ModelError(
            "target='int4_scales' needs the package bitsandbytes; pip install 'zo-trainer[int4]', or write "
            "target='trainable'"
        ) from error
    return bitsandbytes


def _eight_bit(model: nn.Module) -> str:
    """A remark for the error message if the model has 8-bit layers."""
    library = sys.modules.get("bitsandbytes")
    if library is not None and any(
        isinstance(module, library.nn.Linear8bitLt) and not module.state.has_fp16_weights for module in model.modules()
    ):
        return " (its 8-bit layers round their inputs to int8 too, and are not supported)"
    return ""
