"""Estimates a training run: bytes in each place, bytes moved per step, and a lower bound on the time of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zo_core import ConfigError, ModelError, Slot, ZOConfig
from zo_core.backprop import Backprop
from zo_core.beside_streamed import staying
from zo_core.cache import HEAP_BYTES
from zo_core.noise import noise_bytes
from zo_core.sizes import parse_bytes
from zo_core.streaming import (
    TRIM_BYTES,
    Block,
    arena_slots,
    beyond,
    plan_blocks,
    repeated_layers,
    resident_bytes,
)
from zo_core.targets import slot_keys

from .backward import kept_by_backpropagation, peak_of_gradients
from .rates import Rates
from .trace import Segment, formula, run_probe, together
from .variants import LORA_TARGETS, Int4Linear, with_int4, with_lora

#: Mixed precision: weights and gradients in 16 bits; weights and Adam's two moments in float32.
#: Training in float32 takes the same: weights, gradients and two moments of 4 bytes each.
ADAMW_BYTES = 16

#: Bits per weight of bitsandbytes with double quantisation: a code of 4 bits, a scale of 8 bits for 64 weights,
#: and one of 32 bits for 256 of these scales.
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)

PLACES = (None, "cpu", "disk")


@dataclass(frozen=True)
class Workload:
    """The batch, the method and the machine of a training run.

    Attributes:
        batch_size: sequences per batch.
        length: tokens per sequence.
        device: "cuda" or "cpu", which treat scratch memory differently.
        config: settings; the estimator, number of probes, rule, backprop, blocks and device_memory are used.
        rates: rates of the machine, for the time of a step.
        lora_rank: rank of the adapters.
        lora_targets: names of the layers that have adapters.

    Raises:
        ConfigError: a field is not valid; the message lists all of them.
    """

    batch_size: int = 1
    length: int = 512
    device: str = "cuda"
    config: ZOConfig = field(default_factory=ZOConfig)
    rates: Rates = field(default_factory=Rates)
    lora_rank: int = 16
    lora_targets: tuple[str, ...] = LORA_TARGETS

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)!r} must be a whole number of at least 1"
            for name in ("batch_size", "length", "lora_rank")
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1
        ]
        if self.device not in ("cuda", "cpu"):
            problems.append(f"device={self.device!r} is not known; write 'cuda' or 'cpu'")
        if problems:
            raise ConfigError(problems)

    @property
    def tokens(self) -> int:
        return self.batch_size * self.length


@dataclass(frozen=True)
class Row:
    """One way to train the model; all sizes in bytes.

    Attributes:
        name: a description of the way.
        device: peak memory on the device. The memory of the process itself (Python, libraries, a CUDA
            context) comes on top.
        host: additional host memory; on a CPU both are the same memory, and add up.
        disk: size of the block files; unchanged blocks are read from the checkpoint itself.
        read, written: bytes moved per step, to and from the device or between disk and memory.
        forwards: forwards per step; None if the time is not estimated.
        seconds: lower bound on the time of a step; None if a rate is missing.
        parts: the parts that ``device`` consists of.
        traced: whether the model ran on the meta device; else activations come from a formula, and those of
            backpropagation are missing.

    On a CPU with small blocks, ``device`` includes the freed memory that the heaps of the probes' threads keep.
    """

    name: str
    device: int
    host: int = 0
    disk: int = 0
    read: int = 0
    written: int = 0
    forwards: int | None = None
    seconds: float | None = None
    parts: dict[str, int] = field(default_factory=dict)
    traced: bool = True


def estimate(model: nn.Module, work: Workload) -> list[Row]:
    """Estimates all ways to train a model, and full fine-tuning and QLoRA with backpropagation.

    Args:
        model: a model on the meta device, for example from `skeleton`.
        work: the batch, the method and the machine.

    Returns:
        For each of all weights, int4 scales, LoRA, and LoRA on int4: one row each for resident, streamed from
        host memory and streamed from disk. Then backpropagation, without and with checkpointing. Ways that the model
        does not allow are left out, with ``backprop`` also those in which it names no weight that moves.

    Raises:
        ConfigError: ``lora_targets`` is not the default, and the model has no such layers or no linear ones; or
            ``backprop`` does not fit the model.
    """
    active = _active_parameters(model)
    rank = work.lora_rank
    ways = {"all weights": model}
    for name, change in (
        ("int4 scales", lambda: with_int4(model)),
        (f"LoRA {rank}", lambda: with_lora(model, rank, work.lora_targets)),
        (f"LoRA {rank}, int4", lambda: with_lora(with_int4(model), rank, work.lora_targets)),
    ):
        try:
            ways[name] = change()
        except ConfigError:
            if work.lora_targets != LORA_TARGETS:
                raise
    exact = work.config.resolve().estimator.differentiates or work.config.backprop  # which int4 layers do not allow
    rows = []
    for name, variant in ways.items():
        if exact and "int4" in name:
            continue
        try:
            rows += _streamed_or_not(name, variant, work, active)
        except ConfigError:  # adapters that backprop does not name
            if variant is model:
                raise
    return rows + _backpropagation(model, ways.get(f"LoRA {rank}"), ways.get(f"LoRA {rank}, int4"), work)


def slots_of(model: nn.Module) -> list[Slot]:
    """Returns the slots of the trainable parameters; on meta, weights are tied if they are one parameter."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    holders: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(module)
    keys = slot_keys(name for name, _ in named)
    return [Slot(key, (p,), tuple(holders[id(p)])) for key, (_, p) in zip(keys, named, strict=True)]


def _streamed_or_not(name: str, model: nn.Module, work: Workload, active: int) -> list[Row]:
    config, slots = work.config, slots_of(model)
    differentiated = Backprop(config.backprop or (), config.backprop_lr, config.weight_decay)
    if config.backprop is not None:
        slots = differentiated.rest(model, slots)
    moving = {id(slot.tensor) for slot in slots}
    try:
        stays = staying(model, config.backprop, config.blocks)
    except ConfigError:  # backprop has weights in all layers
        stays = set(map(id, model.parameters()))
    try:
        blocks = plan_blocks(model, config.blocks, moving, stays)
    except ModelError:
        blocks = []
    if work.config.device_memory is not None and blocks:
        memory = parse_bytes(work.config.device_memory)
        blocks = beyond(blocks, resident_bytes(model, blocks), memory, torch.device(work.device))
    segments, traced = _segments(model, slots, blocks, work)
    places = PLACES if blocks and not work.config.resolve().estimator.differentiates else (None,)
    weights = list(differentiated.weights.values())
    gradients = _gradients(model, weights, work)
    return [_row(name, place, model, slots, blocks, segments, traced, work, active, gradients) for place in places]


@dataclass(frozen=True)
class Gradients:
    """What ``backprop`` takes, in bytes; everything is 0 without it.

    Attributes:
        kept: the gradients, which are there while the probes run.
        moments: those of AdamW.
        peak: of the forward and the backward, gradients included; while the weights move, if that is more.
        multiplied: number of weights that multiply tokens twice more in the backward.
    """

    kept: int = 0
    moments: int = 0
    peak: int = 0
    multiplied: int = 0


def _gradients(model: nn.Module, weights: list[nn.Parameter], work: Workload) -> Gradients:
    if not weights:
        return Gradients()
    sizes = list(map(_size, weights))
    peak = peak_of_gradients(model, weights, _inputs(type(model).__name__, _ids(work)))
    # AdamW makes two temporary tensors of each weight, on CUDA of all weights at a time.
    update = sum(sizes) + 2 * (max(sizes) if work.device == "cpu" else sum(sizes))
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    multiplied = sum(weight.numel() for weight in weights if weight.dim() > 1 and id(weight) not in looked_up)
    return Gradients(sum(sizes), 2 * sum(sizes), max(peak or 0, update), multiplied)


def _row(
    name: str,
    place: str | None,
    model: nn.Module,
    slots: list[Slot],
    blocks: list[Block],
    segments: list[Segment],
    traced: bool,
    work: Workload,
    active: int,
    gradients: Gradients,
) -> Row:
    settings = work.config.resolve()
    points = len(settings.estimator.points((0,) * settings.num_probes, 1.0))
    again = len(settings.estimator.multiples)
    blocks = [] if place is None else blocks
    stay = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    where = {id(t): b for b in blocks for held in b.holders.values() for t in held}
    state = 0
    for slot in slots:
        for kind, (shape, dtype) in settings.rule.state(slot.tensor).items():
            if id(slot.tensor) in where:
                where[id(slot.tensor)].specs[f"{slot.key}#{kind}"] = shape, dtype
            else:
                state += shape.numel() * dtype.itemsize
    on_cpu, slots_there = work.device == "cpu", arena_slots(torch.device(work.device))
    turns = max(points, again) if blocks else 1
    moving = [(slot.tensor, slot.scaling) for slot in slots]
    noise = noise_bytes(settings.noise, moving, settings.num_probes, turns, streamed=bool(blocks))
    sizes = [block.nbytes for block in blocks]
    kept = 0 if max(sizes, default=0) >= TRIM_BYTES else HEAP_BYTES
    scratch = together(segments, turns, pooled=on_cpu, kept=kept)
    trained = [b for b in blocks if any(t.requires_grad for held in b.holders.values() for t in held)]
    parts = {
        "weights": sum(_size(t) for key, t in stay.items() if key not in where),
        "rule": state,
        "arena": min(slots_there, len(blocks)) * max((block.arena_bytes for block in blocks), default=0),
        "copies": scratch.copies,
        "activations": scratch.activations * (2 if settings.estimator.differentiates else 1),  # with derivatives
        "gradients, AdamW": gradients.kept + gradients.moments,
        "noise": noise if on_cpu else 0,
    }
    # Gradients come before the probes, whose copies a CPU keeps from the step before.
    before = gradients.peak - gradients.kept - (0 if on_cpu else scratch.copies)
    parts["activations"] = max(parts["activations"], before)
    # If all blocks fit into the arena, they stay there; otherwise each is evicted before it is needed again.
    sweeps = 1 + bool(again) + bool(work.config.backprop)
    read = sweeps * sum(sizes) if len(blocks) > slots_there else 0
    written = sum(block.nbytes for block in trained)
    # On CUDA files are read and written a tensor at a time, on a CPU directly from and to the arena.
    transit = 0 if on_cpu else max((s.numel() * d.itemsize for b in blocks for s, d in b.specs.values()), default=0)
    beside = max((block.nbytes for block in trained), default=0)  # the new file, until it replaces the old one
    forwards = points + again + bool(work.config.backprop)
    operations = 2.0 * work.tokens * (active * forwards + 2 * gradients.multiplied)
    row = Row(
        name=f"{name}, {'resident' if place is None else 'from ' + ('host' if place == 'cpu' else place)}",
        device=sum(parts.values()),
        host=sum(sizes) if place == "cpu" else transit if place == "disk" else 0,
        disk=sum(sizes) + beside if place == "disk" else 0,
        read=read,
        written=written,
        forwards=forwards,
        seconds=_seconds(place, read, written, operations, work.rates),
        parts=parts,
        traced=traced,
    )
    for block in blocks:
        block.specs = {name: block.specs[name] for name in block.holders}
    return row


def _seconds(place: str | None, read: int, written: int, operations: float, rates: Rates) -> float | None:
    """Returns ``max(bytes / bandwidth, operations / rate)``.

    Copies to and from the device overlap; reads and writes of a disk add up.
    """
    bounds = [None if rates.flops is None else operations / rates.flops]
    if place is not None:
        bounds.append(None if rates.link is None else max(read, written) / rates.link)
    if place == "disk":
        bounds.append(None if rates.disk is None else (read + written) / rates.disk)
    known = [bound for bound in bounds if bound is not None]
    return max(known) if len(known) == len(bounds) else None


def _segments(
    model: nn.Module, slots: list[Slot], blocks: Sequence[Block], work: Workload
) -> tuple[list[Segment], bool]:
    ids = _ids(work)
    config: Any = getattr(model, "config", None)
    modules = [block.module for block in blocks]
    # A CPU copies module by module.
    repeated = [] if work.device == "cpu" else repeated_layers(model, work.config.blocks)
    for inputs in _inputs(type(model).__name__, ids):
        try:
            return run_probe(model, slots, modules, partial(model, **inputs), repeated), True
        except Exception:  # a forward that needs values, which do not exist, may raise any error
            continue
    width = int(getattr(config, "hidden_size", 0) or getattr(config, "d_model", 0) or 0)
    vocabulary = int(getattr(config, "vocab_size", 0) or 0)
    return formula(model, slots, work.tokens, width, vocabulary), False


def _inputs(class_name: str, ids: Tensor) -> list[dict[str, Tensor]]:
    """Returns batches to try for a model of this class."""
    per_sequence = class_name.endswith("ForSequenceClassification")
    labels = {"labels": ids[:, 0] if per_sequence else ids}
    mask = {"attention_mask": torch.ones_like(ids)}
    return [{"input_ids": ids} | mask | labels, {"input_ids": ids} | labels, {"input_ids": ids}]


def _active_parameters(model: nn.Module) -> int:
    """Counts the parameters that multiply each token: no lookup tables, and no experts that are not chosen."""
    config: Any = getattr(model, "config", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    experts = next(
        (getattr(config, n) for n in ("num_local_experts", "num_experts", "n_routed_experts") if hasattr(config, n)),
        None,
    )
    share = chosen / experts if chosen and experts else 1.0
    users: dict[int, list[tuple[str, nn.Module, Tensor]]] = {}
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            users.setdefault(id(parameter), []).append((f"{name}.{leaf}", module, parameter))
    total = 0.0
    for held in users.values():
        name, _, parameter = held[0]
        if not all(isinstance(module, nn.Embedding) for _, module, _ in held):
            total += parameter.numel() * (share if ".experts." in name else 1.0)
    return int(total)


def _backpropagation(model: nn.Module, lora: nn.Module | None, qlora: nn.Module | None, work: Workload) -> list[Row]:
    """Rows with weights, gradients, moments and activations, without and with checkpointing."""
    count = sum(p.numel() for p in model.parameters())
    ways = [("AdamW, all weights", "AdamW", model, {"weights, gradients, AdamW": ADAMW_BYTES * count}, 0)]
    if lora is not None and qlora is not None:
        adapters = ADAMW_BYTES * sum(p.numel() for p in qlora.parameters() if p.requires_grad)
        codes = {id(p) for p in qlora.parameters() if p.dtype == torch.uint8}
        coded = sum(2 * p.numel() for p in qlora.parameters() if id(p) in codes)
        frozen = [p for p in qlora.parameters() if not p.requires_grad and id(p) not in codes]
        parts = {"weights": int(coded * NF4_BITS / 8) + sum(map(_size, frozen)), "adapters, AdamW": adapters}
        layers = [m.shape.numel() * m.dtype.itemsize for m in qlora.modules() if isinstance(m, Int4Linear)]
        ways.append(("QLoRA", "QLoRA", lora, parts, max(layers, default=0)))
    rows = []
    batches, repeated = _inputs(type(model).__name__, _ids(work)), len(repeated_layers(model, work.config.blocks))
    for name, short, variant, parts, dequantised in ways:
        kept = kept_by_backpropagation(variant, batches, repeated)
        if kept is None:
            rows.append(Row(f"backprop: {name}", sum(parts.values()), parts=parts, traced=False))
            continue
        for title, activations in ((name, kept.plain), (f"{short}, checkpointing", kept.checkpointed)):
            if activations is not None:
                own = {**parts, "activations": activations + dequantised}
                rows.append(Row(f"backprop: {title}", sum(own.values()), parts=own))
    return rows


def _ids(work: Workload) -> Tensor:
    return torch.zeros(work.batch_size, work.length, dtype=torch.int64, device="meta")


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
