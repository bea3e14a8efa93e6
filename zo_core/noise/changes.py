"""What a pass does with each weight, and passes over many tensors in one launch."""

from __future__ import annotations

import importlib
import threading
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Change:
    """How the sum ``s`` of a direction's terms changes weights, element by element; all numbers are float32 values.

        add:       theta' = decay * theta + s
        sign:      theta' = decay * theta + rate * sign(s)
        momentum:  m' = beta * m + s,   theta' = decay * theta + rate * m'

    With an anchor ``theta' + pull * (anchor - theta')`` takes the place of ``theta'``.

    Attributes:
        kind: one of these.
        decay: factor for the weights.
        rate: factor for what is added.
        beta: factor for the momentum.
        momentum: m, flat, in the type that weights are moved in; it is changed in place.
        anchor: weights to which others are pulled, flat, in the type of these; not for relative scales.
        pull: by which part of the distance.
    """

    kind: Literal["add", "sign", "momentum"] = "add"
    decay: float = 1.0
    rate: float = 1.0
    beta: float = 0.0
    momentum: Tensor | None = None
    anchor: Tensor | None = None
    pull: float = 0.0

    @classmethod
    def plain(cls, decay: float = 1.0) -> Change:
        """Adds ``s`` to ``decay`` times the weights."""
        return ADDITION if decay == 1.0 else cls(decay=decay)

    def __call__(self, weights: Tensor, s: Tensor, start: int, stop: int) -> None:
        """Changes ``weights`` in place, those from ``start`` to ``stop``; ``s`` may be overwritten."""
        if self.decay != 1.0:
            weights.mul_(self.decay)
        if self.momentum is not None:
            weights.add_(self.momentum[start:stop].mul_(self.beta).add_(s) * self.rate)
        else:
            weights.add_(s.sign_().mul_(self.rate) if self.kind == "sign" else s)
        if self.anchor is not None:
            weights.add_((self.anchor[start:stop] - weights).mul_(self.pull))


#: What most passes do; they share this object.
ADDITION = Change()


class Pass(NamedTuple):
    """One pass over a slot's weights, as from `Direction.apply`; ``direction`` is a `Direction`."""

    theta: Tensor
    direction: Any
    change: Change
    out: Tensor


def fused_backend(name: str, theta: Tensor) -> Any:
    """The module with the fused passes for ``theta``, or None for the eager ones."""
    if name == "triton" and theta.is_cuda:
        return importlib.import_module(".triton_backend", __package__)
    if name == "compile" and theta.numel():
        return importlib.import_module(".compile_backend", __package__)
    return None


def fused(one: Pass) -> bool:
    """Does a pass in a kernel: now, or at the end of `together`.

    Returns:
        False if the eager pass has to do it. Nothing waits any more then, so it may read any tensor.
    """
    backend = fused_backend(one.direction.backend, one.theta)
    plain = one.direction.part is None and one.change.anchor is None
    able = plain and backend is not None and backend.supports(one)
    waiting: Waiting | None = getattr(_local, "waiting", None)
    if able and waiting is not None and one.direction.backend == "triton":
        waiting.add(one)
        return True
    flush()
    if able:
        backend.run([one])
    return able


def add_all(directions: Sequence[Any], thetas: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    """``out = round(theta + s)`` of several tensors of one kind of device, as `Direction.add_to` does each.

    Args:
        directions: a `Direction` for each tensor.
        thetas: the weights. None of them shares memory with another one, or with an ``out``.
        outs: where the results go.
    """
    backend = fused_backend(directions[0].backend, thetas[0])
    if backend is not None and directions[0].backend == "triton":
        flush()
        if backend.add_alike(directions, thetas, outs):
            return
        pairs = zip(thetas, directions, outs, strict=True)
        passes = [Pass(theta, direction, ADDITION, out) for theta, direction, out in pairs]
        if all(one.direction.part is None and backend.supports(one) for one in passes):
            backend.run(passes)
            return
    with together(apart=True):
        for direction, theta, out in zip(directions, thetas, outs, strict=True):
            direction.add_to(theta, out=out)


def flat(tensor: Tensor) -> Tensor:
    """The elements in row-major order, as a view where the strides allow it."""
    return tensor.reshape(-1)


def flat_target(theta: Tensor, out: Tensor) -> Tensor:
    """Where to write row-major results for ``out``: itself, or a buffer if its strides forbid it."""
    return out.view(-1) if out.is_contiguous() else torch.empty(theta.numel(), dtype=out.dtype, device=out.device)


# Passes that wait

_local = threading.local()


@contextmanager
def together(*, apart: bool = False) -> Iterator[None]:
    """A context in which Triton passes of this thread wait for its end, where one launch does all that are alike.

    Passes within it may be in any order, and each sees what earlier ones wrote. Other code must not read or write
    these tensors before the end or a `flush`. Without Triton every pass runs at once, as ever.

    Args:
        apart: the caller knows that no pass writes what another one reads or writes, so nobody looks.
    """
    if getattr(_local, "waiting", None) is not None:
        yield
        return
    _local.waiting = waiting = Waiting(apart)
    try:
        yield
    finally:
        _local.waiting = None
        waiting.run()


def flush() -> None:
    """Runs what waits in `together`, before code that reads or writes weights by other means."""
    waiting: Waiting | None = getattr(_local, "waiting", None)
    if waiting is not None:
        waiting.run()


class Waiting:
    """Passes that wait, none of which writes what another one reads or writes: their order is free.

    Args:
        apart: whether that is known.
    """

    def __init__(self, apart: bool = False) -> None:
        self.apart = apart
        self._clear()

    def _clear(self) -> None:
        self.passes: list[Pass] = []
        #: Memory that they use, disjoint and sorted: first address, end, and whether it is only read.
        self.spans: list[tuple[int, int, bool]] = []

    def add(self, one: Pass) -> None:
        """Adds a pass; if it meets the memory of another one, those that wait are run first."""
        if self.apart:
            self.passes.append(one)
            return
        out = _span(one.out)
        spans = [(*out, False)]
        if one.theta is not one.out and (theta := _span(one.theta)) != out:
            spans.append((*theta, True))
        if one.change.momentum is not None:
            spans.append((*_span(one.change.momentum), False))
        for span in spans:
            if self._meets(span):
                self.run()
                break
        for span in spans:
            at = bisect_left(self.spans, span)
            if self.spans[at : at + 1] != [span]:
                self.spans.insert(at, span)
        self.passes.append(one)

    def _meets(self, span: tuple[int, int, bool]) -> bool:
        first, end, only_read = span
        if not self.spans or self.spans[-1][1] <= first:  # as usual: a model's weights were allocated in this order
            return False
        at = bisect_left(self.spans, (first, -1, False))
        before, after = self.spans[at - 1 : at] if at else [], self.spans[at : at + 1]
        if only_read and after == [span]:
            return False
        return any(other[1] > first for other in before) or any(other[0] < end for other in after)

    def run(self) -> None:
        """Runs what waits."""
        passes = self.passes
        self._clear()
        if passes:
            fused_backend("triton", passes[0].theta).run(passes)


def _span(tensor: Tensor) -> tuple[int, int]:
    """First address of a tensor, and the one after its last element."""
    first = tensor.data_ptr()
    if tensor.is_contiguous():
        return first, first + tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (last + 1) * tensor.element_size()
