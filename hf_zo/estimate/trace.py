"""Counts the memory of a probe besides the weights: a probe runs on the meta device, and its tensors are counted.

The model's own forward runs with the hooks that perturb it in training. So the trace counts all tensors that
are alive at once: perturbed copies, activations, logits, the upcast copy of the loss. It does not count the
workspaces of kernels, and counts attention as fused.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zo_core import Point, Rademacher, Slot
from zo_core.modes import eval_mode
from zo_core.noise import Direction
from zo_core.probing import Materialised, ScratchPool

#: Number of elements and dtype of a perturbed copy, the key of `ScratchPool`; None for all other tensors.
Kind = tuple[int, torch.dtype] | None


@dataclass
class Segment:
    """The live tensors between the ends of two consecutive blocks.

    Attributes:
        peak: peak of all bytes.
        peaks: peak of the bytes of each kind.
        end: bytes of each kind at the end.
    """

    peak: int = 0
    peaks: Counter[Kind] = field(default_factory=Counter)
    end: Counter[Kind] = field(default_factory=Counter)


@dataclass(frozen=True)
class Scratch:
    """Bytes besides the weights while the probes of a step run.

    Attributes:
        copies: bytes of perturbed copies of weights.
        activations: bytes of everything else; with a caching allocator (CUDA) so many that, together with
            ``copies``, they are the peak.
    """

    copies: int
    activations: int


class Trace(TorchDispatchMode):
    """Counts the bytes of live tensors that were made while the mode is active.

    Args:
        held: earlier tensors, which are not counted.
    """

    def __init__(self, held: Iterable[Tensor]):
        super().__init__()
        self.kind: Kind = None
        self.live: Counter[Kind] = Counter()
        self.segments = [Segment()]
        self._known = {tensor.untyped_storage()._cdata for tensor in held}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True  # a model checks its batch: is the mask full, is nothing packed?
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: Any) -> None:
        identity = storage._cdata
        if identity in self._known:
            return
        self._known.add(identity)
        kind, size = self.kind, storage.nbytes()
        self.live[kind] += size
        weakref.finalize(storage, self._forget, identity, kind, size)
        segment = self.segments[-1]
        segment.peak = max(segment.peak, sum(self.live.values()))
        segment.peaks[kind] = max(segment.peaks[kind], self.live[kind])

    def _forget(self, identity: int, kind: Kind, size: int) -> None:
        self._known.discard(identity)
        self.live[kind] -= size

    def cut(self) -> None:
        """Ends the segment at the end of a block, and begins a new one."""
        self.segments[-1].end = Counter(self.live)
        self.segments.append(Segment(sum(self.live.values()), Counter(self.live)))


class FusedAttention(TorchFunctionMode):
    """Makes attention allocate and keep only what the fused kernels of CPU and CUDA do.

    Args:
        attend: makes the result, without values, of ``query``, ``key`` and ``value``.
    """

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]):
        super().__init__()
        self.attend = attend

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            return self.attend(named["query"], named["key"], named["value"])
        return func(*args, **kwargs)


def attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The result of attention, without values."""
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


class _Unmoved(Direction):
    """A direction without values, for weights without values."""

    def add_to(self, theta: Tensor, decay: float = 1.0, out: Tensor | None = None) -> Tensor:
        return theta if out is None else out


def _unmoved(slot: Slot, point: Point) -> Direction:
    return _Unmoved(Rademacher(), slot.key, ((0, 1.0),))


class _CountedPool(ScratchPool):
    """Labels its tensors as perturbed copies."""

    def __init__(self, trace: Trace):
        super().__init__()
        self.trace = trace

    def take(self, like: Tensor) -> Tensor:
        self.trace.kind = (like.numel(), like.dtype) if like.is_contiguous() else None
        try:
            return torch.empty_like(like, requires_grad=False)
        finally:
            self.trace.kind = None

    def take_all(self, likes: list[Tensor]) -> list[Tensor]:
        return [self.take(like) for like in likes]


def run_probe(
    model: nn.Module,
    slots: list[Slot],
    blocks: Collection[nn.Module],
    closure: Callable[[], Any],
    repeated: Sequence[nn.Module] = (),
) -> list[Segment]:
    """Runs one probe of a model on the meta device; its trace is cut at the ends of ``blocks``.

    Args:
        model: the model.
        slots: what is perturbed.
        blocks: the layers that are streamed.
        closure: runs the model.
        repeated: the layers whose weights are copied at once, if an earlier probe has shown that they can be.

    Raises:
        Exception: any error of the model, for example because its forward depends on values.
    """
    trace = Trace([*model.parameters(), *model.buffers()])
    realisation = Materialised(model, slots, _unmoved, repeated)
    with ExitStack() as stack:
        for context in (torch.no_grad(), eval_mode(model), FusedAttention(attended)):
            stack.enter_context(context)
        originals = stack.enter_context(realisation.measuring())
        if repeated:
            with Trace([]), realisation.at(Point(0, 1.0), originals):
                closure()
        realisation.pool = _CountedPool(trace)
        stack.enter_context(trace)
        stack.enter_context(realisation.at(Point(0, 1.0), originals))
        for block in blocks:
            stack.callback(block.register_forward_hook(lambda *_: trace.cut()).remove)
        closure()
        trace.segments[-1].end = Counter(trace.live)  # copies of tied weights stay until all probes are done
    return trace.segments


def formula(model: nn.Module, slots: list[Slot], tokens: int, width: int, vocabulary: int) -> list[Segment]:
    """Replaces `run_probe` if a model's forward depends on values: counts the largest module, and the logits.

    Logits are counted in float32 three times (upcast, logarithms, and one temporary copy), hidden states
    eight times.
    """
    own: dict[nn.Module, Counter[Kind]] = {}
    kept: Counter[Kind] = Counter()
    for slot in slots:
        kind, size = (slot.tensor.numel(), slot.tensor.dtype), slot.tensor.numel() * slot.tensor.element_size()
        if len(slot.modules) > 1:
            kept[kind] += size
        for module in slot.modules[:1] if len(slot.modules) == 1 else ():
            own.setdefault(module, Counter())[kind] += size
    peaks: Counter[Kind] = Counter()
    for counter in own.values():
        peaks |= counter
    peaks += kept
    peaks[None] = 4 * tokens * max(3 * vocabulary, 8 * width)
    largest = max((sum(counter.values()) for counter in own.values()), default=0)
    return [Segment(largest + sum(kept.values()) + peaks[None], peaks, kept + Counter({None: 4 * tokens * width}))]


def together(segments: Sequence[Segment], probes: int, pooled: bool, kept: int = 0) -> Scratch:
    """Returns the memory of ``probes`` probes that pass through each block in turn.

    While one probe runs through a block, each of the others waits at the block's beginning or end. With one
    probe at a time this is the largest segment.

    Args:
        segments: segments of one probe.
        probes: number of probes that run in lockstep.
        pooled: whether perturbed copies are kept for reuse, by size (`ScratchPool` on the CPU), instead of being
            returned to an allocator that can reuse their memory for any tensor.
        kept: most bytes of freed memory that the heap of a probe's thread keeps (`trim_heaps`).
    """
    best, kinds = 0, Counter[Kind]()
    before: Counter[Kind] = Counter()
    for segment in segments:
        waiting = before | segment.end
        parked = (probes - 1) * max(sum(before.values()), sum(segment.end.values()))
        best = max(best, segment.peak + parked)
        for kind in segment.peaks:
            kinds[kind] = max(kinds[kind], segment.peaks[kind] + (probes - 1) * waiting[kind])
        before = segment.end
    copies = sum(size for kind, size in kinds.items() if kind is not None)
    if pooled:
        most = max((segment.peaks[None] for segment in segments), default=0)
        return Scratch(copies, max(kinds[None], most + (probes - 1) * min(most, kept)))
    return Scratch(min(copies, best), best - min(copies, best))
