"""Backpropagation in some layers of a model whose other layers are streamed: who stays, and who is in the graph.

Layers with weights that backpropagation moves stay resident. The others run before them, on inputs that require no
gradient, so that autograd keeps nothing of them, and their memory may be given to the next layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .backprop import named
from .errors import ConfigError
from .streaming import Streaming, repeated_layers


def staying(model: nn.Module, names: Sequence[str] | None, blocks: Sequence[str] | None) -> set[int]:
    """The ``id`` of all parameters of the layers that hold weights under backprop.

    Args:
        model: the module that is trained.
        names: those of the setting ``backprop``; None for a run without.
        blocks: those of the setting ``blocks``.

    Raises:
        ConfigError: no layer is left to stream.
    """
    if names is None:
        return set()
    found, layers = named(model, names), repeated_layers(model, blocks)
    held = [[id(parameter) for parameter in layer.parameters()] for layer in layers]
    differentiated = [layer for layer in held if not found.isdisjoint(layer)]
    if layers and len(differentiated) == len(layers):
        raise ConfigError(
            [
                f"backprop={list(names)} has weights in every layer, which therefore stays resident, and none is left "
                "to stream; name fewer modules, or leave out offload"
            ]
        )
    return {weight for layer in differentiated for weight in layer}


def check_resident(names: Sequence[str], weights: dict[str, nn.Parameter], streaming: Streaming) -> None:
    """Raises `ConfigError` if a weight under backprop is streamed, in a model that was streamed earlier."""
    for name, weight in weights.items():
        home = streaming.home([weight])
        if home is not None:
            raise ConfigError(
                [
                    f"backprop={list(names)} moves {name!r}, and its layer {home[0].name!r} is streamed already, so "
                    "that it is gone when the gradient is due; leave it out of blocks=[...] where the model is opened"
                ]
            )


@contextmanager
def ungraphed(streaming: Streaming | None) -> Iterator[None]:
    """A context in which it is an error if a streamed layer becomes a part of an autograd graph.

    Hooks of autograd's saved tensors would not do: a closure may have its own, as checkpointing has, and only the
    innermost ones are called.
    """
    if streaming is None:
        yield
        return
    handles = [block.module.register_forward_hook(partial(_refuse, block.name)) for block in streaming.blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _refuse(name: str, layer: nn.Module, arguments: Any, result: Any) -> None:
    tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ConfigError(
            [
                f"backprop differentiates through the layer {name!r}, which is streamed and gone when its gradient is "
                "due, because it comes after weights that backprop names, or uses one of them (a head that is tied to "
                "the embedding does); name the last layers without a gap and untie the head, or leave out offload"
            ]
        )
