"""Deciding what is streamed, and setting it up."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..probing.materialise import is_compiled
from ..sizes import human
from ..targets import check_values, in_several_ways, memory_of, move_scales, plain_parameters
from .blocks import find_blocks
from .budget import known_to_fit, note_fit, room_for_weights
from .copies import check_device, with_index
from .store import DiskStore, RamStore, own_folder
from .streaming import Block, Streaming, arena_slots

logger = logging.getLogger(__name__)


def offload(
    model: nn.Module,
    kind: str,
    folder: str | os.PathLike[str] | None = None,
    names: Sequence[str] | None = None,
    moving: Collection[int] = (),
    staying: Collection[int] = (),
    *,
    device: torch.device | None = None,
    memory: int | None = None,
    state: int = 0,
) -> Streaming | None:
    """Moves the blocks of a model into a store; from then on each is fetched when its forward needs it.

    Args:
        model: parameters that are also used outside of their block stay resident.
        kind: "cpu" (host memory), "disk", or "auto": in ``folder`` if there is one, else in host
            memory, and only what does not fit into the device's free memory.
        folder: for "disk", where the block files go; None makes a temporary folder.
        names: names of the blocks; None finds them.
        moving: ``id`` of the tensors that training changes. If they are the smaller part of their
            block (adapters on a frozen base), they stay resident, and the block is never written.
        staying: ``id`` of tensors that stay resident in any case.
        device: where the model computes; what is resident is moved there. None leaves it where it is.
        memory: bytes that weights may take on the device; blocks that fit are not streamed. None
            streams all of them, or, with "auto", takes what is free, less a reserve (`room_for_weights`).
        state: bytes of the rule's state of all weights, for which "auto" leaves room.

    Returns:
        The object that streams the blocks; None if all of them stay resident.

    Raises:
        ModelError: the model has no blocks, or is compiled.
        ConfigError: blocks cannot be streamed to the device.
        StateError: a block could not be stored. As after every other exception, the model is as it was.
    """
    _check(model)
    blocks = plan_blocks(model, names, moving, staying)
    if not blocks:
        raise ModelError("every parameter of the blocks is also used outside of them, so nothing can be streamed")
    home = {id(tensor) for block in blocks for held in block.holders.values() for tensor in held}
    resident = [parameter for parameter in model.parameters() if id(parameter) not in home]
    place = with_index(device or next(p.device for p in (*resident, *model.parameters())))
    undecided = kind == "auto" and memory is None
    if undecided and not known_to_fit(model, place):
        memory = room_for_weights(model, place, _largest(blocks, resident), state)
    if memory is not None or kind == "auto":
        blocks = beyond(blocks, resident_bytes(model, blocks), memory, place)
    streaming = None
    if blocks:
        check_device(place)
        disk = kind == "disk" or folder is not None
        store = DiskStore(own_folder(folder)) if disk else RamStore(pinned=place.type == "cuda")
        streaming = _streamed(model, blocks, store, place, move=device is not None)
        describe(model, streaming)
    elif device is not None:
        model.to(place)
    if undecided and streaming is None:
        note_fit(model, place)
    return streaming


def _check(model: nn.Module) -> None:
    """Raises `ModelError` for models that cannot be streamed."""
    if any(map(is_compiled, model.modules())):
        raise ModelError("a compiled model cannot be streamed, its blocks are out of reach; leave out torch.compile")
    check_values(model, frozen=True)
    wrapped = set(map(id, model.parameters())) - {id(tensor) for _, tensor in plain_parameters(model)}
    if wrapped:
        name, weight = next((name, p) for name, p in model.named_parameters() if id(p) in wrapped)
        raise ModelError(
            f"{name} is a {type(weight).__name__}, and a weight that is made of several tensors cannot be streamed; "
            "leave out offload, or quantise with bitsandbytes (BitsAndBytesConfig(load_in_4bit=True))"
        )


def _largest(blocks: list[Block], resident: list[nn.Parameter]) -> int:
    return max(*(block.nbytes for block in blocks), *(_nbytes([parameter]) for parameter in resident), 0)


def _streamed(
    model: nn.Module, blocks: list[Block], store: RamStore | DiskStore, place: torch.device, *, move: bool
) -> Streaming:
    """Stores the blocks and streams them; if that fails, the model has its values where they were.

    Args:
        model: the model.
        blocks: blocks of the model.
        store: takes their values.
        place: where they compute.
        move: whether what is resident has to be moved there.
    """
    before = {id(tensor): tensor.device for tensor in (*model.parameters(), *model.buffers())}
    with torch.no_grad():
        for block in blocks:  # all of them, before any parameter loses its values
            store.put(block.name, {name: tensors[0].data for name, tensors in block.holders.items()})
            if isinstance(store, RamStore):
                _share_memory(block, store)
    streaming = Streaming(blocks, store, place)
    try:
        if move:
            model.to(place)
    except BaseException:
        streaming.close(torch.device("cpu"))
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.data = tensor.data.to(before[id(tensor)])
        raise
    return streaming


def _share_memory(block: Block, store: RamStore) -> None:
    """Points parameters in host memory at their stored values, or the model would be there twice for a moment."""
    for name, values in store.whole(block.name).items():
        for tensor in block.holders[name]:
            if tensor.device.type == "cpu":
                tensor.data = values


def plan_blocks(
    model: nn.Module,
    names: Sequence[str] | None = None,
    moving: Collection[int] = (),
    staying: Collection[int] = (),
) -> list[Block]:
    """The blocks of a model with the parameters that can be streamed; see `offload`."""
    modules = find_blocks(model, names)
    staying = {*staying, *in_several_ways(model)}
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
            stays = any(id(tensor) in staying for _, tensor in held)
            if all(holder in inside for holder, _ in held) and parameter.is_contiguous() and not stays:
                streamed[local] = list({id(tensor): tensor for _, tensor in held}.values())
        still = {local: tensors for local, tensors in streamed.items() if not any(id(t) in moving for t in tensors)}
        if 2 * _nbytes(t[0] for t in still.values()) > _nbytes(t[0] for t in streamed.values()):
            streamed = still
        if streamed:
            blocks.append(Block(name, module, streamed))
    return blocks


def move_streamed(model: nn.Module, device: torch.device) -> None:
    """Makes a streamed model compute on another device, where `Module.to` would allocate what is absent.

    Args:
        model: a model with streamed blocks.
        device: where the resident part goes, and each block when its forward needs it.
    """
    streaming = Streaming.of(model)
    assert streaming is not None
    device = with_index(device)
    if streaming.device != device:
        streaming.compute_on(device)
    streamed = {id(tensor) for block in streaming.blocks for held in block.holders.values() for tensor in held}

    def move(module: nn.Module) -> None:
        if not any(id(parameter) in streamed for parameter in module.parameters()):
            module.to(device)
            return
        for child in module.children():
            move(child)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if id(tensor) not in streamed:
                tensor.data = tensor.data.to(device)
        move_scales(module, device)

    move(model)


def beyond(blocks: list[Block], resident: int, memory: int | None, device: torch.device) -> list[Block]:
    """The leading ones of ``blocks``, as many as do not fit.

    Args:
        blocks: all that could be streamed.
        resident: bytes that stay resident in any case.
        memory: bytes for what stays, and for the arena of the rest; None for no limit.
        device: where they compute.
    """
    if memory is None or resident + sum(block.nbytes for block in blocks) <= memory:
        return []
    arena = arena_slots(device) * max(block.arena_bytes for block in blocks)
    count = len(blocks)
    while count > 1 and resident + arena + blocks[count - 1].nbytes <= memory:
        count -= 1
        resident += blocks[count].nbytes
    return blocks[:count]


def resident_bytes(model: nn.Module, blocks: list[Block]) -> int:
    """Bytes of the parameters that are in none of ``blocks``."""
    streamed = {id(tensor) for block in blocks for held in block.holders.values() for tensor in held}
    rest = {memory_of(p): p for p in model.parameters() if id(p) not in streamed}
    return _nbytes(rest.values())


def describe(model: nn.Module, streaming: Streaming) -> None:
    """Logs one line: what is where, and how much a step reads and writes."""
    blocks, store = streaming.blocks, streaming.store
    size = sum(block.nbytes for block in blocks)
    written = sum(b.nbytes for b in blocks if any(t.requires_grad for held in b.holders.values() for t in held))
    logger.info(
        "%d blocks, %s, are streamed from %s; %s stay on %s, with room for %d blocks of up to %s; a step reads %s "
        "and writes %s",
        len(blocks),
        human(size),
        f"files in {store.folder}" if isinstance(store, DiskStore) else "host memory",
        human(resident_bytes(model, blocks)),
        streaming.device,
        streaming.slots,
        human(streaming.slot_bytes),
        human(size),
        human(written),
    )


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
