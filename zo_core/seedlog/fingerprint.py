"""The fingerprint of a model: SHA-256 over all bytes of every parameter.

Parameters that training moves are identified by their slot keys. The names and the order of frozen ones
(the base of an adapter) do not matter, so prefixes that a trainer adds do not change the fingerprint.
Buffers are not part of it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..digests import digest
from ..errors import StateError
from ..targets import elsewhere, memory_of, parts_of, plain_parameters

if TYPE_CHECKING:
    from ..engine import ZeroOrder

#: Begins a digest of what this process holds of tensors that are dealt out: it says nothing about the whole ones.
PART = "part "


def fingerprint(engine: ZeroOrder) -> dict[str, Any]:
    """Identifies the current weights in memory, without the pending updates of low-rank windows.

    Reads streamed blocks one at a time.

    Returns:
        ``slots``: shape, dtype and digest of each slot by key; ``frozen``: the number of all other
        parameters and their digest; ``digest``: of all of this. Digests of what is dealt out to several processes
        begin with "part ".
    """
    engine.flush()
    engine.target.relink(engine.slots)
    with engine.hidden():
        digests = _digests(engine)
    slots = {
        slot.key: [
            list(slot.shape),
            str(slot.tensor.dtype).removeprefix("torch."),
            ("" if slot.part is None else PART) + digests[id(slot.tensor)][1],
        ]
        for slot in engine.slots
    }
    moving = {id(tensor) for slot in engine.slots for tensor in slot.tensors}
    others = {id(p): " ".join(digests[id(p)]) for _, p in plain_parameters(engine.model) if id(p) not in moving}
    dealt = any(part and id(held) in others for _, held, part in parts_of(engine.model.named_parameters()))
    frozen_digest = hashlib.sha256("\n".join(sorted(others.values())).encode()).hexdigest()[:16]
    frozen = [len(others), (PART if dealt else "") + frozen_digest]
    everything = repr((sorted(slots.items()), frozen))
    return {"slots": slots, "frozen": frozen, "digest": hashlib.sha256(everything.encode()).hexdigest()[:32]}


def _digests(engine: ZeroOrder) -> dict[int, tuple[str, str]]:
    """Dtype with shape, and digest, of every parameter by ``id``; for streamed ones those of the real values."""
    found: dict[int, tuple[str, str]] = {}
    tensors: dict[int, Tensor] = {id(p): p for _, p in plain_parameters(engine.model)}
    tensors |= {id(slot.tensor): slot.tensor for slot in engine.slots}
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for ids, blocks in _streamed(engine):
            for each, result in zip(ids, pool.map(_described, blocks), strict=True):
                found.update(dict.fromkeys(each, result))
        for _, stand_in, read in elsewhere(engine.model):
            found[id(stand_in)] = _described(read())
        resident = {key: tensor for key, tensor in tensors.items() if key not in found}
        shared: dict[tuple[object, ...], list[int]] = {}
        for key, tensor in resident.items():
            shared.setdefault(memory_of(tensor), []).append(key)
        values = [resident[keys[0]].data for keys in shared.values()]
        wait_for({value.device for value in values})
        for keys, result in zip(shared.values(), pool.map(_described, values), strict=True):
            found.update(dict.fromkeys(keys, result))
    return found


def wait_for(devices: Iterable[torch.device]) -> None:
    """Waits for the work that is queued on CUDA devices: other threads read on streams of their own."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _described(tensor: Tensor) -> tuple[str, str]:
    return f"{tensor.dtype} {tuple(tensor.shape)}", digest(tensor)


def _streamed(engine: ZeroOrder) -> Iterator[tuple[list[list[int]], list[Tensor]]]:
    """The tensors of each streamed block, and the ids of the parameters that each of them replaces."""
    if engine.streaming is None:
        return
    for block in engine.streaming.blocks:
        whole = engine.streaming.store.whole(block.name)
        yield [[id(t) for t in held] for held in block.holders.values()], [whole[name] for name in block.holders]


def check_base(logged: dict[str, Any], found: dict[str, Any], name: str, *, frozen: bool = True) -> None:
    """Checks that a model is the one that a log began with, except for the values of what was dealt out to processes.

    Args:
        logged: the result of `fingerprint` when the log began.
        found: its result for this model.
        name: name of the log, for messages.
        frozen: also compare the parameters that do not move.

    Raises:
        StateError: the models differ; the message has both sides.
    """
    check_slots(logged, found, name)
    other = [key for key, value in logged["slots"].items() if _differ(value[2], found["slots"][key][2])]
    if other:
        raise StateError(
            f"{name} began with other weights than this model has: {_list(other)} of {len(logged['slots'])} trained "
            f"tensors have other values (fingerprint {logged['digest']} in the log, {found['digest']} here); load the "
            "base model that the run started from, in the same dtype and before any training"
        )
    counts = logged["frozen"][0] != found["frozen"][0]
    if frozen and (counts or _differ(logged["frozen"][1], found["frozen"][1])):
        raise StateError(
            f"{name} began with another frozen base than this model has: {_frozen(logged)} in the log, "
            f"{_frozen(found)} here; load the base model that the run started from, in the same dtype"
        )


def _differ(one: str, other: str) -> bool:
    return one != other and not (one.startswith(PART) or other.startswith(PART))


def check_slots(logged: dict[str, Any], found: dict[str, Any], name: str) -> None:
    """Raises `StateError` unless the tensors that move have the same names, shapes and dtypes."""
    then, now = logged["slots"], found["slots"]
    missing, extra = [key for key in then if key not in now], [key for key in now if key not in then]
    if missing or extra:
        parts = [f"{_list(missing)} only in the log"] if missing else []
        parts += [f"{_list(extra)} only here"] if extra else []
        raise StateError(
            f"{name} trained {len(then)} tensors and {len(now)} of this model would move ({'; '.join(parts)}); "
            "load the same model, with the same parameters trainable"
        )
    for key, (shape, dtype, _) in then.items():
        if now[key][:2] != [shape, dtype]:
            raise StateError(
                f"{name} trained {key!r} as {dtype} {shape}, and this model has it as {now[key][1]} {now[key][0]}; "
                "load the base model in the dtype of the run"
            )


def _list(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _frozen(print_: dict[str, Any]) -> str:
    return f"{print_['frozen'][0]} tensors with fingerprint {print_['frozen'][1]}"
