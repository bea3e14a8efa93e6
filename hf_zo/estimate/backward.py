"""What backpropagation needs besides weights, gradients and moments: a forward and a backward on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zo_core.modes import eval_mode

from .trace import FusedAttention, Trace, attended


class _Fused(torch.autograd.Function):
    """What fused attention keeps for its backward pass: its inputs, its result, and a number for each row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = attended(query, key, value)
        ctx.save_for_backward(query, key, value, result, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@dataclass(frozen=True)
class Kept:
    """Bytes besides weights and their gradients.

    Attributes:
        plain: peak of a forward and a backward.
        checkpointed: the same if each layer keeps only its inputs and computes the rest again; None if the model
            cannot.
    """

    plain: int
    checkpointed: int | None


def kept_by_backpropagation(model: nn.Module, batches: list[dict[str, Tensor]], layers: int) -> Kept | None:
    """Counts what a forward and a backward keep, without dropout.

    Args:
        model: on the meta device; unchanged.
        batches: inputs with labels; the first that the model takes is used.
        layers: number of layers that checkpointing computes again one by one. Which they are is what the model's own
            ``activation_checkpointing_enable`` chooses.

    Returns:
        None if the model cannot run without values.
    """
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # fine-tuning mostly has none, and kernels differ in what they keep of a mask
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop)
    for inputs in batches:
        try:
            peak, after = _run(model, inputs, Tensor.backward)
            break
        except Exception:  # a forward that needs values, which do not exist, may raise any error
            continue
    else:
        return None
    try:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})  # type: ignore[operator]
        getattr(model, "enable_input_require_grads", lambda: None)()
        _, less = _run(model, inputs)
    except Exception:
        return Kept(peak, None)
    # The backward pass computes one layer again at a time; before that, it has the logits and their gradient.
    saved = after - less
    return Kept(peak, max(peak - saved, less + saved // max(layers, 1)))


def peak_of_gradients(model: nn.Module, weights: Sequence[Tensor], batches: list[dict[str, Tensor]]) -> int | None:
    """Bytes that a forward and the gradients of some weights take at their peak, these gradients included.

    Args:
        model: on the meta device; unchanged.
        weights: no other weight requires a gradient meanwhile.
        batches: inputs with labels; the first that the model takes is used.

    Returns:
        None if the model cannot run without values.
    """
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    own = {id(weight) for weight in weights}

    def differentiate(loss: Tensor) -> object:
        return torch.autograd.grad(loss, weights, allow_unused=True)

    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in own)
        for inputs in batches:
            try:
                with eval_mode(model):
                    return _run(model, inputs, differentiate)[0]
            except Exception:  # as above
                continue
        return None
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def _run(
    model: nn.Module, inputs: dict[str, Tensor], backward: Callable[[Tensor], object] | None = None
) -> tuple[int, int]:
    """Returns the peak, and what is alive after the forward."""
    trace = Trace([*model.parameters(), *model.buffers()])
    with torch.enable_grad(), FusedAttention(_Fused.apply), trace:
        loss = model(**inputs).loss
        after = sum(trace.live.values())
        if backward is not None:
            backward(loss)
    return trace.segments[-1].peak, after


def _drop(parameter: Tensor) -> None:
    """Gradients are counted with the optimizer."""
    parameter.grad = None
