"""Models whose layers accelerate keeps on disk or in host memory, and loads for their forward.

Between forwards such weights are on ``meta``. Accelerate is not imported: its hooks are recognised by their attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..errors import ModelError


def elsewhere(model: nn.Module) -> Iterator[tuple[str, Tensor, Callable[[], Tensor]]]:
    """The parameters that a hook loads: the name of each, its placeholder, and a function that reads the values."""
    for prefix, module in model.named_modules():
        for hook in _hooks(module):
            for name, parameter in module.named_parameters(recurse=bool(getattr(hook, "place_submodules", False))):
                if parameter.is_meta:
                    yield f"{prefix}.{name}".lstrip("."), parameter, partial(_read, hook, name, parameter)


def _hooks(module: nn.Module) -> list[Any]:
    """The hooks of accelerate on a module that load weights."""
    hook = getattr(module, "_hf_hook", None)
    return [each for each in getattr(hook, "hooks", [hook]) if getattr(each, "offload", False)]


def _read(hook: Any, name: str, parameter: Tensor) -> Tensor:
    value: Tensor = hook.weights_map[name]
    return value.to(parameter.dtype)


def check_values(model: nn.Module, *, frozen: bool = False) -> None:
    """Raises `ModelError` if accelerate keeps layers elsewhere, so that trainable parameters have no values.

    Args:
        model: any module.
        frozen: whether frozen parameters need values, too.
    """
    if not any(True for _ in elsewhere(model)):
        return
    for name, parameter in model.named_parameters():
        if parameter.is_meta and (frozen or parameter.requires_grad):
            raise ModelError(
                f"parameter {name!r} has no values: accelerate keeps layers of this model on disk or in host memory "
                "(device_map, cpu_offload, disk_offload) and lends them for each forward, where no step could change "
                "them; open the checkpoint with hf_zo.from_pretrained_offloaded(AutoModelForCausalLM, name), or load "
                "it without device_map and set offload='cpu' or 'disk' (in ZOConfig, or zo_offload), which streams "
                "what is trained, too"
            )
