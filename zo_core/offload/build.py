"""Deciding what is streamed, and setting it up."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..oracle.materialise import is_compiled
from ..targets import memory_of
from .blocks import find_blocks
from .store import DiskStore, RamStore
from .streaming import Block, Streaming


def offload(
    model: nn.Module,
    kind: str,
    folder: str | os.PathLike[str] | None = None,
    names: Sequence[str] | None = None,
    moving: Collection[int] = (),
) -> Streaming:
    """Moves the blocks of a model into a store; from then on they come when their forward needs them.

    Args:
        model: its parameters that are reachable from outside their block stay where they are.
        kind: "cpu" (host memory) or "disk".
        folder: for "disk", where the block files go; None makes a temporary folder.
        names: of the blocks; None finds them.
        moving: ``id`` of the tensors that training changes. Where they are the smaller part of their
            block (adapters on a frozen base) they stay, and the block is never written.

    Raises:
        ModelError: no blocks, or a compiled model.
    """
    if any(map(is_compiled, model.modules())):
        raise ModelError("a compiled model cannot be streamed, its blocks are out of reach; leave out torch.compile")
    modules = find_blocks(model, names)
    holders: dict[tuple[object, ...], list[tuple[nn.Module, Tensor]]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(memory_of(parameter), []).append((module, parameter))
    blocks = []
    for name, module in modules.items():
        inside = set(module.modules())
        streamed: dict[str, list[Tensor]] = {}
        for local, parameter in module.named_parameters():
            held = holders[memory_of(parameter)]
            if all(holder in inside for holder, _ in held) and parameter.is_contiguous():
                streamed[local] = list({id(tensor): tensor for _, tensor in held}.values())
        still = {local: tensors for local, tensors in streamed.items() if not any(id(t) in moving for t in tensors)}
        if 2 * _nbytes(still) > _nbytes(streamed):
            streamed = still
        if streamed:
            blocks.append(Block(name, module, streamed))
    if not blocks:
        raise ModelError("every parameter of the blocks is also used outside of them, so nothing can be streamed")
    home = {id(tensor) for block in blocks for tensors in block.holders.values() for tensor in tensors}
    resident = [parameter for parameter in model.parameters() if id(parameter) not in home]
    device = next((p.device for p in (*resident, *model.parameters())), torch.device("cpu"))
    store = RamStore() if kind == "cpu" else DiskStore(folder)
    return Streaming(blocks, store, device)


def _nbytes(tensors: dict[str, list[Tensor]]) -> int:
    return sum(held[0].numel() * held[0].element_size() for held in tensors.values())
