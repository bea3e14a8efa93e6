"""Scratch memory for perturbed copies, reused from layer to layer."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from ..cache import kept

#: Alignment of CUDA's allocator.
SLAB_STEP = 512


class ScratchPool:
    """Hands out tensors shaped like weights, and reuses those that are no longer referenced.

    A model may keep a view of a weight for longer than its module's forward, so a buffer is reused
    only once this pool holds the last reference to its memory. CUDA's caching allocator does all of
    this by itself; on the CPU a fresh allocation costs page faults, more time than filling it.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, torch.dtype], list[Tensor]] = {}
        #: Slabs by layout: each with its views, and the use count of one that nobody else refers to.
        self._slabs: dict[object, list[tuple[Tensor, list[Tensor], int]]] = {}

    def take(self, like: Tensor) -> Tensor:
        """An uninitialised tensor with the shape, strides, dtype and device of ``like``."""
        if like.device.type == "cpu" and like.is_contiguous():
            buffers = self._buffers.setdefault((like.numel(), like.dtype), [])
            for buffer in buffers:
                if torch._C._storage_Use_Count(buffer.untyped_storage()._cdata) == ALONE:
                    return buffer.view(like.shape)
            with torch.inference_mode(False):
                buffers.append(torch.empty(like.numel(), dtype=like.dtype))
            return buffers[-1].view(like.shape)
        with torch.inference_mode(False):
            return torch.empty_like(like, requires_grad=False)

    def take_all(self, likes: list[Tensor]) -> list[Tensor]:
        """As `take`, for several contiguous tensors of one device, in one slab of memory until `end`.

        Each begins at a multiple of 512 bytes, as a tensor by itself does on CUDA, so that the same kernels run.
        """
        device = likes[0].device
        stream = torch.cuda.current_stream(device).stream_id if device.type == "cuda" else None
        slabs = self._slabs.setdefault((device, stream, *((like.shape, like.dtype) for like in likes)), [])
        for slab, views, alone in slabs:
            if torch._C._storage_Use_Count(slab.untyped_storage()._cdata) == alone:
                return views.copy()
        sizes = [like.numel() * like.element_size() for like in likes]
        places = [0, *accumulate(-(-size // SLAB_STEP) * SLAB_STEP for size in sizes)]
        with torch.inference_mode(False):
            slab = torch.empty(places[-1], dtype=torch.uint8, device=device)
            views = [
                slab[place : place + size].view(like.dtype).view(like.shape)
                for place, size, like in zip(places, sizes, likes, strict=False)
            ]
        slabs.append((slab, views, int(torch._C._storage_Use_Count(slab.untyped_storage()._cdata))))
        return views.copy()

    def end(self) -> None:
        """Called when no probe runs: frees the memory that the device's allocator gives out again at no cost."""
        self._slabs.clear()

    @property
    def nbytes(self) -> int:
        """Bytes held: for each size as many buffers as were in use at once."""
        return sum(buffer.numel() * buffer.element_size() for held in self._buffers.values() for buffer in held)

    def clear(self) -> None:
        """Frees the memory."""
        self._buffers.clear()
        self._slabs.clear()


def _count_alone() -> int:
    """The use count of a storage that only one tensor and the query itself hold."""
    probe = torch.empty(1)
    return int(torch._C._storage_Use_Count(probe.untyped_storage()._cdata))


ALONE = _count_alone()


def nan_like(tensor: Tensor, *, dense: bool = False) -> Tensor:
    """NaN in the shape of ``tensor``, in the memory of one element.

    Integers (codes of quantised weights) have no NaN: for them the result is an empty tensor, any
    use of which fails.

    Args:
        tensor: determines shape, dtype and device.
        dense: allocate memory for every element, for tensors that kernels read by their address.
    """
    return _nan(tensor.shape, tensor.dtype, tensor.device, dense)


def nan(shape: torch.Size, dtype: torch.dtype, device: torch.device, dense: bool = False) -> Tensor:
    """As `nan_like`, in memory that no other tensor shares."""
    with torch.inference_mode(False):
        if not (dtype.is_floating_point or dtype.is_complex):
            return torch.empty((0, *shape[1:]), dtype=dtype, device=device)
        return torch.full(shape if dense else (), float("nan"), dtype=dtype, device=device).expand(shape)


_nan = kept(32 << 20)(nan)
