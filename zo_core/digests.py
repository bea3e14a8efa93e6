"""Digests of tensors."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

#: Bytes of a tensor on a device that are copied to the host at a time.
PIECE = 1 << 26


def digest(tensor: Tensor) -> str:
    """Hashes the bytes of a tensor, of any shape and dtype, in row-major order; returns 16 hexadecimal digits."""
    whole = hashlib.sha256()
    flat = tensor.detach().reshape(-1)
    step = max(1, PIECE // max(1, flat.element_size()))
    for start in range(0, flat.numel(), step):
        whole.update(flat[start : start + step].cpu().contiguous().view(torch.uint8).numpy().data)
    return whole.hexdigest()[:16]
