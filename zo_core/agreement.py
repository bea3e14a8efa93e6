"""What the processes of a run have to have in common before their first step: settings, and weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import chain
from typing import Any

from torch import Tensor

from .backprop import Backprop
from .digests import digest
from .errors import ConfigError, StateError
from .exchange import Alone
from .ranks import Ranks, world_size
from .running import Running
from .streaming import share
from .targets import parts_of, plain_tensors
from .version import __version__

logger = logging.getLogger(__name__)

#: Settings that belong to a process: where it computes, and where it keeps blocks.
OWN = ("device", "offload_dir", "device_memory")


def agree(engine: Running) -> None:
    """Compares the processes of a run, and gives all of them the weights of rank 0; does nothing for one process.

    Processes of one host then share their streamed blocks.

    Raises:
        ConfigError: they have different settings; on every process, with both sides.
        StateError: streamed weights differ, or the process group was made after the engine.
    """
    exchange = engine.exchange
    if isinstance(exchange, Alone) and engine.config.ranks is not None and world_size() > 1:
        raise StateError("the process group was made after ZeroOrder(...); call init_process_group() first")
    if not isinstance(exchange, Ranks):
        if engine.streaming is not None:
            engine.streaming.keep_own()  # of an earlier engine with several processes
        return
    facts = exchange.everywhere(_facts(engine))
    problems = [
        f"{name}={theirs[name]!r} on rank {rank}, and {name}={facts[0].get(name)!r} on rank 0"
        for rank, theirs in enumerate(facts)
        for name in theirs
        if theirs[name] != facts[0].get(name)
    ]
    if problems:
        raise ConfigError([f"the processes of this run differ: {problem}" for problem in problems[:5]])
    if engine.streaming is not None:
        engine.streaming.rest()
    _same_weights(engine, exchange)
    if engine.streaming is None:
        share(None, {}, exchange)
    else:
        engine.streaming.share(exchange)


def _facts(engine: Running) -> dict[str, Any]:
    config = engine.config.to_dict()
    groups = [
        {key: value for key, value in group.items() if isinstance(value, (int, float, bool))}
        for group in engine.optimizer.param_groups
    ]
    return {
        "version": __version__,
        **{name: value for name, value in config.items() if name not in OWN},
        "step": engine.step_count,
        "seed": engine.seed,
        "directions": engine.num_probes,
        "parameter groups": groups,
        "trained tensors": [(slot.key, tuple(slot.shape), str(slot.tensor.dtype)) for slot in engine.slots],
        **({"tensors under backprop": None} if engine.backprop is None else _under(engine.backprop)),
        **engine.facts,
        "normaliser": None if engine.normaliser is None else engine.normaliser.saved(),
    }


def _under(backprop: Backprop) -> dict[str, Any]:
    """What has to be the same of the part that backpropagation moves: weights, settings, and what AdamW keeps."""
    assert backprop.optimizer is not None, "the engine calls begin() first"
    groups = [
        {key: value for key, value in group.items() if key != "params"} for group in backprop.optimizer.param_groups
    ]
    kept = {
        name: {key: digest(value) for key, value in backprop.optimizer.state.get(weight, {}).items()}
        for name, weight in backprop.weights.items()
    }
    return {
        "tensors under backprop": [
            (n, tuple(weight.shape), str(weight.dtype)) for n, weight in backprop.weights.items()
        ],
        "max_norm of backprop": backprop.max_norm,
        "AdamW of backprop": groups,
        **{f"AdamW's moments of {name}": moments for name, moments in kept.items()},
    }


def _same_weights(engine: Running, exchange: Ranks) -> None:
    tensors = dict(_resident(engine))
    streamed = {(name, ""): tensor for name, tensor in _streamed(engine)}
    found = exchange.everywhere({key: digest(tensor) for key, tensor in (tensors | streamed).items()})
    other = [key for key in dict.fromkeys(chain(*found)) if len({each[key] for each in found if key in each}) > 1]
    if not other:
        return
    own = [key for key in other if key in streamed or key[1]]
    if own:
        kind = "streamed" if own[0] in streamed else "sharded"
        raise StateError(
            f"the processes hold different weights in {own[0][0]!r} and {len(own) - 1} other {kind} "
            "tensors; load the same checkpoint in every process"
        )
    for key in other:
        exchange.send(tensors[key])
    logger.warning(
        "%d tensors (%s …) had other values on some processes, as new heads and adapters have without a common seed; "
        "all processes start with those of rank 0",
        len(other),
        other[0][0],
    )


def _resident(engine: Running) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """Resident tensors by name, and by which part of the tensor a process holds.

    Those that move need not be parameters: the scales of bitsandbytes are none.
    """
    hidden = {id(tensor) for block in _blocks(engine) for held in block.holders.values() for tensor in held}
    named = parts_of((*engine.model.named_parameters(), *engine.model.named_buffers()))
    found = [(*plain, part) for name, tensor, part in named for plain in plain_tensors(name, tensor)]
    known = {id(tensor) for _, tensor, _ in found}
    found += [(slot.key, slot.tensor, slot.part) for slot in engine.slots if id(slot.tensor) not in known]
    for name, tensor, part in found:
        if id(tensor) not in hidden and tensor.device.type != "meta":
            yield (name, "" if part is None else f"{part.begin} {part.size}"), tensor.detach()


def _streamed(engine: Running) -> Iterator[tuple[str, Tensor]]:
    for block in _blocks(engine):
        assert engine.streaming is not None
        for name, tensor in engine.streaming.store.whole(block.name).items():
            yield f"{block.name}.{name}", tensor


def _blocks(engine: Running) -> list[Any]:
    return [] if engine.streaming is None else list(engine.streaming.blocks)
