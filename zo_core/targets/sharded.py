"""Models of which each process holds a part. Tensor parallel is trained; FSDP and DeepSpeed are clear errors.

With tensor parallel (``parallelize_module``, ``from_pretrained(tp_plan="auto")``) a parameter is a DTensor: a tensor in
the memory of this process, and where it lies within the whole one. That tensor moves, by the values that the noise has
there. The processes that hold the parts of a model compute one forward together, and count as one process.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError, ModelError
from ..noise.parts import MOST_ELEMENTS, Part

WAY = (
    "load the whole model in every process, and where it does not fit the device, stream its layers with offload='cpu' "
    "or 'disk' (ZOConfig; zo_offload in the arguments): a host then keeps one copy for all processes"
)


def check_whole(model: nn.Module) -> None:
    """Raises `ModelError` if this process holds a parameter in a form that cannot be trained."""
    for name, module in model.named_modules():
        if any(base.__name__ == "FullyShardedDataParallel" for base in type(module).__mro__):
            raise ModelError(
                f"{name or 'the model'} is wrapped in FullyShardedDataParallel, which deals its parameters out to the "
                f"processes; {WAY}"
            )
        if _is_fsdp(module):
            raise ModelError(
                f"fully_shard has dealt out the parameters of {name or 'the model'} to the processes, which gather "
                f"them for each forward; {WAY}"
            )
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise ModelError(f"parameter {name!r} is dealt out to the processes by DeepSpeed; {WAY}")


def check_settings(model: nn.Module, config: Any, noise: Any, rule: Any, *, streamed: bool) -> None:
    """Raises `ConfigError` for settings with which a model of DTensors cannot be trained.

    Args:
        model: the model.
        config: the `ZOConfig`.
        noise: the noise of the run.
        rule: the update rule.
        streamed: whether the model is streamed already.
    """
    names = [name for name, parameter in model.named_parameters() if _is_dtensor(parameter)]
    if not names:
        return
    problems = []
    if config.ranks is None:
        problems.append("ranks=None: each process would train by itself; leave it out")
    if streamed or config.offload is not None:
        problems.append(f"offload={config.offload!r}: layers are streamed as a whole; leave it out, or {WAY}")
    if not noise.of_elements:
        problems.append(
            f"noise={noise.name!r} needs whole weights; write 'rademacher' or 'gaussian', or 'sampled' of them"
        )
    if rule.wants_optimizer:
        problems.append(f"rule={rule.name!r}: a torch optimizer holds whole weights; write 'sgd', 'momentum' or 'sign'")
    if problems:
        raise ConfigError([f"parameter {names[0]!r} is a DTensor, and {problem}" for problem in problems])


def held(parameter: Tensor) -> Tensor:
    """The tensor with the values of a parameter that this process holds: the parameter, or what is in a DTensor.

    It is the tensor itself: ``to_local()`` may return another object with the same memory, which a probe could not
    replace. Moving the model to another device or dtype gives a DTensor another one.
    """
    if type(parameter) is nn.Parameter or not _is_dtensor(parameter):
        return parameter
    inner = (getattr(parameter, key) for key in parameter.__tensor_flatten__()[0])  # type: ignore[attr-defined]
    return next(each for each in inner if isinstance(each, Tensor))


def held_part(name: str, parameter: Tensor) -> tuple[Tensor, Part | None]:
    """The tensor with the values of a parameter that this process holds, and which part of the whole it is.

    Raises:
        ModelError: a DTensor is laid out in a way that is not known.
    """
    if not _is_dtensor(parameter):
        return parameter, None
    dealt: Any = parameter
    whole, mesh, here = dealt.shape, dealt.device_mesh, dealt.device_mesh.get_coordinate()
    local = held(parameter)
    begin, size = [0] * len(whole), list(whole)
    for dim, placement in enumerate(dealt.placements):
        if placement.is_replicate():
            continue
        if type(placement).__name__ != "Shard" or here is None:
            raise ModelError(
                f"parameter {name!r} is a DTensor with the placement {placement}, of which it is not known which "
                f"elements a process holds (Shard and Replicate are); {WAY}"
            )
        each = -(-size[placement.dim] // mesh.size(dim))  # as torch.chunk deals out rows
        first = min(each * here[dim], size[placement.dim])
        begin[placement.dim] += first
        size[placement.dim] = min(each, size[placement.dim] - first)
    if tuple(local.shape) != tuple(size) or math.prod(whole) > MOST_ELEMENTS:
        raise ModelError(
            f"parameter {name!r} is a DTensor of shape {list(whole)} with the placements {list(dealt.placements)}, and "
            f"this process holds {list(local.shape)} of it instead of {size}, or it has more than {MOST_ELEMENTS:,} "
            f"elements; {WAY}"
        )
    return local, None if list(whole) == size else Part(whole, tuple(begin), tuple(size))


def group_of(model: nn.Module) -> list[int]:
    """Ranks of the processes that hold parts of the model; empty if this process holds all of it."""
    meshes: dict[tuple[int, ...], str] = {}
    for name, parameter in model.named_parameters():
        if _is_dtensor(parameter):
            dealt: Any = parameter
            meshes.setdefault(tuple(sorted(dealt.device_mesh.mesh.flatten().tolist())), name)
    if len(meshes) > 1:
        (one, first), (two, second), *_ = meshes.items()
        raise ModelError(
            f"parameter {first!r} is dealt out to the ranks {list(one)}, and {second!r} to {list(two)}; use one mesh "
            f"for all parameters, or {WAY}"
        )
    return list(next(iter(meshes), ()))


def parts_of(named: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor, Part | None]]:
    """Names of parameters, each with the tensor that this process holds, and which part of the whole it is."""
    return [(name, *held_part(name, parameter)) for name, parameter in named]


def _is_dtensor(parameter: Tensor) -> bool:
    return any(base.__name__ == "DTensor" for base in type(parameter).__mro__)


def _is_fsdp(module: nn.Module) -> bool:
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)
