"""How much of a device weights may take with ``offload="auto"``, and the models that were found to fit."""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..targets import memory_of

#: Part of a device that weights leave free for activations, logits and the libraries' workspaces, and its minimum.
SPARE = 0.1
LEAST = 1 << 30

#: Copies of the largest layer, or of the embeddings, that perturbed weights may take at a time.
COPIES = 2

_fitting: WeakKeyDictionary[nn.Module, torch.device] = WeakKeyDictionary()


def room_for_weights(model: nn.Module, device: torch.device, largest: int, state: int) -> int | None:
    """Bytes that the weights of a model may take on a device.

    What the model has there already counts as free, so the answer is the same before and after it was moved.

    Args:
        model: any model.
        device: where it computes.
        largest: bytes of its largest layer, or of its largest resident tensor.
        state: bytes of the rule's state (momentum) of all weights. The weights that stay take their part of it along.

    Returns:
        The number of bytes; None for a device that does not tell how much memory it has free.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    own = _nbytes(parameter for parameter in model.parameters() if parameter.device == device)
    room = free + cached + own - max(LEAST, int(SPARE * total)) - COPIES * largest
    weights = _nbytes(model.parameters())
    return max(0, room) * weights // (weights + state) if weights else max(0, room)


def note_fit(model: nn.Module, device: torch.device) -> None:
    """Remembers that the whole model has room on a device."""
    _fitting[model] = device


def known_to_fit(model: nn.Module, device: torch.device) -> bool:
    """Whether a model was found to fit a device, and is there: it is then not asked again in the middle of its run."""
    return _fitting.get(model) == device and all(parameter.device == device for parameter in model.parameters())


def _nbytes(tensors: Iterable[Tensor]) -> int:
    apart = {memory_of(tensor): tensor for tensor in tensors}
    return sum(tensor.numel() * tensor.element_size() for tensor in apart.values())
