"""Where a model that is streamed lives: its blocks in host memory, the rest on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from zo_core import ZOConfig
from zo_core.offload import Streaming
from zo_core.offload.blocks import find_blocks


def place(model: nn.Module, config: ZOConfig, device: torch.device) -> None:
    """Moves a model to the device, except for the parameters of blocks that are to be streamed.

    A model with nothing outside of its blocks is moved as a whole, because the device of the rest tells
    the engine where to compute.
    """
    inside: set[int] = set()
    if config.offload is not None:
        blocks = find_blocks(model, config.blocks)
        inside = {id(parameter) for block in blocks.values() for parameter in block.parameters()}
    if all(id(parameter) in inside for parameter in model.parameters()):
        inside = set()
    _move(model, device, lambda tensor: id(tensor) in inside)


def settle(model: nn.Module, streaming: Streaming, device: torch.device) -> None:
    """Moves what `place` left behind and the engine does not stream: adapters, and what blocks share."""
    _move(model, device, lambda tensor: streaming.home((tensor,)) is not None)


def _move(model: nn.Module, device: torch.device, stays: Callable[[Tensor], bool]) -> None:
    model._apply(lambda tensor: tensor if stays(tensor) else tensor.to(device))
