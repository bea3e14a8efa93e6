"""Models of which each process holds a part: tensor parallel, FSDP, DeepSpeed. None of them can be trained yet.

They are recognised by the types of their parameters and the names of their wrappers, also where the parts are frozen:
all processes that hold parts of one model have to compute with the same point of the same step on the same batch, and
this library gives each process points, or batches, of its own.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import ModelError

WAY = (
    "load the whole model in every process, and where it does not fit the device, stream its layers with offload='cpu' "
    "or 'disk' (ZOConfig; zo_offload in the arguments): a host then keeps one copy for all processes"
)


def check_whole(model: nn.Module) -> None:
    """Raises `ModelError` if this process holds only a part of a parameter."""
    for name, module in model.named_modules():
        if any(base.__name__ == "FullyShardedDataParallel" for base in type(module).__mro__):
            raise ModelError(
                f"{name or 'the model'} is wrapped in FullyShardedDataParallel, which deals its parameters out to the "
                f"processes; {WAY}"
            )
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise ModelError(f"parameter {name!r} is dealt out to the processes by DeepSpeed; {WAY}")
        if _is_dtensor(parameter):
            raise ModelError(f"parameter {name!r} is a DTensor, {_said(parameter)}, as after {_maker(model)}; {WAY}")


def _is_dtensor(parameter: Tensor) -> bool:
    return any(base.__name__ == "DTensor" for base in type(parameter).__mro__)


def _said(parameter: Tensor) -> str:
    placements = ", ".join(map(str, getattr(parameter, "placements", ())))
    return f"of which each process holds a part ({placements})"


def _maker(model: nn.Module) -> str:
    if any(base.__name__ == "FSDPModule" for module in model.modules() for base in type(module).__mro__):
        return "fully_shard"
    return "parallelize_module, or from_pretrained with tp_plan"
