"""The arithmetic of moving weights along directions, stated once.

    theta' = round(decay * theta + s),   s = round(c_1 z_1) + round(c_2 z_2) + ...

Each ``c`` is a float32 and ``s`` is summed left to right in float32; ``decay * theta + s`` is formed
in float32, or in float64 for float64 weights. There is no fused multiply-add, and ``round`` is to
nearest even, except that updates of 16-bit weights round stochastically. Every path (eager in
chunks, compiled, Triton) gives these bits.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from ..cache import workspace
from .changes import Change, Pass, flat, flat_target, flush, fused
from .hashing import BATCH_WORDS, DIRECTION, Key, stream_key, words
from .parts import Band, Part
from .rounding import DROPPED_BITS, rounding_key, store

#: Pairs ``(seed, c)`` of a direction and its coefficient.
Terms = tuple[tuple[int, float], ...]

#: Elements handled at a time, so that temporaries stay in the cache of a CPU core.
CPU_CHUNK = 1 << 18

#: Elements at a time on other devices, so that a launch takes them longer than Python takes to make it. A pass has
#: temporaries of up to `CHUNK_BYTES` for each of them.
DEVICE_CHUNK, CHUNK_BYTES = 1 << 22, 48

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


#: The largest finite float32.
FLOAT32_MAX = float(torch.finfo(torch.float32).max)


def float32(value: float) -> float:
    """The nearest float32, as a Python float."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which weights of ``dtype`` are moved."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def float64(tensor: Tensor) -> Tensor:
    """A tensor in float64; on the host for devices of Apple, which have none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).to(torch.float64)


class Elements(Protocol):
    """The part of a distribution that the passes over weights use; see `ElementNoise`."""

    @property
    def values_per_word(self) -> int: ...

    @property
    def signs(self) -> bool: ...

    def expand(self, bits: Tensor, scale: float, out: Tensor) -> None: ...

    def stack(self, seeds: Sequence[int], slot: str, numel: int, device: torch.device) -> Tensor: ...


@dataclass(frozen=True)
class Scaling:
    """How positive scales of quantised weights move (QZO, arXiv 2505.13430).

        absolute:  theta' = max(floor, round(decay * theta + s))
        relative:  theta' = max(floor, round(theta * (decay + s)))

    The relative form is one rounding of a float64 product. A scale that is already below the floor (0 in
    a block of zeros) is not raised to it, but sinks no further: a move by ``s = 0`` changes nothing.

    Attributes:
        relative: move by a fraction of the value, so that one eps fits layers of any magnitude.
        floor: minimum of a scale.
    """

    relative: bool = True
    floor: float = 1e-7

    def moved(self, theta: Tensor, change: Callable[[Tensor], object]) -> Tensor:
        """New values for ``theta``, in its dtype; ``change`` moves weights in place as ordinary weights move."""
        work = torch.ones_like(theta, dtype=torch.float64) if self.relative else theta.clone()
        change(work)
        if self.relative:
            work.mul_(theta)
        return torch.maximum(work.to(theta.dtype), theta.clamp(max=self.floor))


@dataclass(frozen=True)
class Passes:
    """How the passes over a slot's weights are computed, whatever direction they add.

    Attributes:
        rounding_seed: as in `Direction`.
        backend: as in `Direction`.
        scaling: as in `Direction`.
        thresholds: mask thresholds of the run, by slot; a mask adds its own when it is first needed. None if they
            are not to be kept.
        part: as in `Direction`.
    """

    rounding_seed: int | None = None
    backend: str = "eager"
    scaling: Scaling | None = None
    thresholds: MutableMapping[str, float] | None = None
    part: Part | None = None

    @cached_property
    def of_directions(self) -> dict[str, Any]:
        """What a `Direction` of a whole slot has of these."""
        how = {"rounding_seed": self.rounding_seed, "backend": self.backend, "scaling": self.scaling}
        return {**how, "part": self.part, "offset": None}


#: Passes over ordinary weights, rounded to nearest.
PLAIN = Passes()


@dataclass(frozen=True)
class Direction:
    """``s = sum of round(c * z(seed))`` over some probes, for one slot.

    Attributes:
        noise: the distribution of the elements of z.
        slot: key of the slot, part of the hash.
        terms: pairs ``(seed, c)``; empty if the slot does not move.
        rounding_seed: seed of the random bits for stochastic rounding; None rounds to nearest.
        backend: ``"eager"``, ``"compile"`` or ``"triton"``; the bits are the same.
        scaling: how quantisation scales move; None for ordinary weights.
        offset: None moves the whole slot. A number moves only the piece that begins at this index, by the
            values that it has within the whole slot. A piece has `piece_size` elements, and only the eager
            backend supports it. It uses the words of the batch that contains it, so consecutive pieces of
            a batch hash them only once.
        part: the part of the slot that is moved, by the values that it has within the whole slot; None for all of
            it. Only the eager backend supports it.
    """

    noise: Elements
    slot: str
    terms: tuple[tuple[int, float], ...]
    rounding_seed: int | None = None
    backend: str = "eager"
    scaling: Scaling | None = None
    offset: int | None = None
    part: Part | None = None

    @property
    def still(self) -> bool:
        """Whether nothing moves, so that weights need neither a copy nor an update."""
        return not self.terms

    def misses(self, numel: int) -> bool:
        """Whether no element of a slot of this size moves, apart from updates that are pending."""
        return not self.terms

    def limit(self, theta: Tensor) -> float:
        """The largest magnitude of an element of ``theta`` that moves; infinite if all elements move."""
        return math.inf

    def mask(self, theta: Tensor) -> Callable[[Tensor], Tensor] | None:
        """A function that returns for any part of ``theta`` which elements move, as bools; None if all do."""
        limit = self.limit(theta)
        return None if limit == math.inf else lambda weights: weights.abs() <= limit

    def gradient(self, theta: Tensor) -> Tensor:
        """``s`` as it applies to these weights, with any mask, float32 of their shape."""
        return self.values(theta.shape, theta.device)

    def scaled(self, factor: float) -> Direction:
        """The same direction with every coefficient multiplied by ``factor``, in float64."""
        return self.along(tuple([(seed, c * factor) for seed, c in self.terms]))

    def along(self, terms: Terms) -> Self:
        """The same direction with other terms. `dataclasses.replace` takes ten times as long."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, terms=terms)
        return other

    @staticmethod
    def of(noise: Elements, slot: str, terms: Terms, passes: Passes) -> Direction:
        """A direction whose passes are computed in this way, in a fifth of the time: a step makes three per tensor."""
        made = object.__new__(Direction)
        made.__dict__.update(noise=noise, slot=slot, terms=terms, **passes.of_directions)
        return made

    def keys(self) -> list[tuple[Key, float]]:
        """Stream key and float32 coefficient of each term."""
        return [(stream_key(seed, self.slot, DIRECTION), float32(c)) for seed, c in self.terms]

    def rounding_key(self, dtype: torch.dtype) -> Key | None:
        """Key of the rounding bits, or None where weights of ``dtype`` round to nearest."""
        if self.rounding_seed is None or dtype not in DROPPED_BITS:
            return None
        return rounding_key(self.rounding_seed, self.slot)

    def chunks(self, numel: int, device: torch.device) -> Iterator[tuple[int, int, Tensor]]:
        """``(start, stop, s[start:stop])`` with ``s`` in float32, in order; valid until the next chunk."""
        if self.part is not None:
            yield from self._part_chunks(self.part, device)
            return
        for start, stop, bits in self._pieces(numel, device):
            yield start, stop, self._sum(bits, device)[: stop - start]

    def _sum(self, bits: Sequence[Tensor], device: torch.device) -> Tensor:
        """``s`` of the elements of some words, which are those of each term."""
        coefficients = [c for _, c in self.keys()]
        size = bits[0].numel() * self.noise.values_per_word
        total = workspace("sum", size, device)
        self.noise.expand(bits[0], coefficients[0], total)
        for word, c in zip(bits[1:], coefficients[1:], strict=True):
            term = workspace("term", size, device)
            self.noise.expand(word, c, term)
            total.add_(term)
        return total

    def _part_chunks(self, part: Part, device: torch.device) -> Iterator[tuple[int, int, Tensor]]:
        keys, per_word = self.keys(), self.noise.values_per_word
        for start, stop in part.pieces(chunk_sizes(per_word, device)[1]):
            band = part.band(start, stop)
            word, before = divmod(band.first, per_word)
            count = -(-(before + band.length) // per_word)
            s = self._sum([words(key, word, count, device) for key, _ in keys], device)
            yield start, stop, band.pick(s[before : before + band.length])

    def place(self, start: int, stop: int) -> int | Band:
        """Where a chunk lies in the slot: its first index, or the band of a part."""
        return (self.offset or 0) + start if self.part is None else self.part.band(start, stop)

    def _pieces(self, numel: int, device: torch.device) -> Iterator[tuple[int, int, list[Tensor]]]:
        """``(start, stop, words of each term)`` of every chunk."""
        keys = self.keys()
        per_word = self.noise.values_per_word
        batch, chunk = chunk_sizes(per_word, device)
        bits: list[Tensor] = []
        for start in range(0, numel, chunk):
            stop = min(start + chunk, numel)
            offset = start % batch
            if offset == 0:
                count = -(-min(batch, numel - start) // per_word)
                bits = [self._words(key, start // per_word, count, device) for key, _ in keys]
            piece = slice(offset // per_word, -(-(offset + stop - start) // per_word))
            yield start, stop, [word[piece] for word in bits]

    def _words(self, key: Key, start: int, count: int, device: torch.device) -> Tensor:
        if self.offset is None:
            return words(key, start, count, device)
        first = self.offset // self.noise.values_per_word
        within = first % BATCH_WORDS
        return words(key, first - within, BATCH_WORDS, device)[within:]

    def values(self, shape: torch.Size, device: torch.device) -> Tensor:
        """``s`` as a whole, float32 of the given shape."""
        out = torch.empty(shape.numel(), dtype=torch.float32, device=device)
        for start, stop, s in self.chunks(out.numel(), device):
            out[start:stop] = s
        return out.view(shape)

    def add_to(self, theta: Tensor, decay: float = 1.0, out: Tensor | None = None) -> Tensor:
        """``out = round(decay * theta + s)``, in place by default.

        Args:
            theta: floating point weights of any shape and strides.
            decay: a factor for ``theta``, rounded to float32.
            out: where the result goes; it has the shape and dtype of ``theta``.

        Returns:
            ``out``.
        """
        return self.apply(theta, Change.plain(float32(decay)), out)

    def apply(self, theta: Tensor, change: Change, out: Tensor | None = None) -> Tensor:
        """``out = round(theta')``, in place by default: one pass over the weights, in a kernel if the backend has one.

        Args:
            theta: floating point weights of any shape and strides.
            change: gives ``theta'`` from ``theta`` and ``s``.
            out: where the result goes; it has the shape and dtype of ``theta``.

        Returns:
            ``out``.
        """
        out = theta if out is None else out
        if not fused(Pass(theta, self, change, out)):
            self.apply_eager(theta, change, out)
        return out

    def apply_eager(self, theta: Tensor, change: Change, out: Tensor) -> None:
        """The same in chunks of torch operations."""
        plain = change.kind == "add" and change.anchor is None
        if plain and self.scaling is None and self.limit(theta) == math.inf:
            self._add_eager(theta, change.decay, out)
        else:
            rewrite(theta, self, change, out)

    def _add_eager(self, theta: Tensor, decay: float, out: Tensor) -> None:
        source, target = flat(theta), flat_target(theta, out)
        wide = compute_dtype(theta.dtype)
        half = theta.dtype in DROPPED_BITS and self.rounding_key(theta.dtype) is None
        if half and self._signs_alone and decay == 1.0:
            self._add_signs(source, target)
        else:
            self._add_wide(source, target, wide, decay)
        if target.data_ptr() != out.data_ptr():
            out.copy_(target.view(out.shape))

    @property
    def _signs_alone(self) -> bool:
        """Whether ``s`` is signs times one number."""
        return self.noise.signs and len(self.terms) == 1 and self.part is None

    def _add_signs(self, source: Tensor, target: Tensor) -> None:
        """A probe of 16-bit weights along signs, with half the memory traffic: the terms never exist in float32."""
        one = source.new_ones(())
        ((_, c),) = self.keys()
        for start, stop, (bits,) in self._pieces(source.numel(), source.device):
            signs = workspace("sum", 16 * bits.numel(), source.device).view(source.dtype)
            self.noise.expand(bits, 1.0, signs)
            # addcmul computes in float32 and rounds once; add(alpha=c) would round c to 16 bits.
            torch.addcmul(source[start:stop], signs[: stop - start], one, value=c, out=target[start:stop])

    def _add_wide(self, source: Tensor, target: Tensor, wide: torch.dtype, decay: float) -> None:
        for start, stop, s in self.chunks(source.numel(), source.device):
            old, new = source[start:stop], target[start:stop]
            if source.dtype == wide:
                if decay == 1.0:
                    torch.add(old, s, out=new)
                else:
                    torch.mul(old, decay, out=new).add_(s)
            else:
                work = workspace("weights", stop - start, source.device).copy_(old)
                if decay != 1.0:
                    work.mul_(decay)
                store(work.add_(s), new, self.rounding_key(source.dtype), self.place(start, stop))


def chunk_sizes(per_word: int, device: torch.device) -> tuple[int, int]:
    """How many elements are hashed, and how many of these are moved, at a time."""
    batch = BATCH_WORDS * per_word
    if device.type == "cpu":
        return batch, min(CPU_CHUNK, batch)
    while 2 * batch <= DEVICE_CHUNK:
        batch *= 2
    return batch, batch


def piece_size(noise: Elements) -> int:
    """Number of elements in a piece of a slot, such that it stays in the cache and lies in one batch of words."""
    return min(CPU_CHUNK, BATCH_WORDS * noise.values_per_word)


def rewrite(
    theta: Tensor,
    direction: Direction,
    change: Callable[[Tensor, Tensor, int, int], object],
    out: Tensor | None = None,
    back: bool = False,
) -> None:
    """Rewrites a slot chunk by chunk, for changes of other forms than ``decay * theta + s``.

    Args:
        theta: the weights.
        direction: gives ``s`` and the rounding.
        change: called with ``(weights, s, start, stop)``, both flat and in the wide type; changes
            ``weights`` in place. Elements that the direction does not move have ``s`` 0 and keep their
            values, whatever ``change`` does to them.
        out: where the result goes instead of ``theta``.
        back: ``change`` reverts a move along this direction; see `stochastic_round`.
    """
    out = theta if out is None else out
    flush()
    source, target = flat(theta), flat_target(theta, out)
    wide = compute_dtype(theta.dtype)
    mask = direction.mask(source)
    for start, stop, s in direction.chunks(source.numel(), theta.device):
        work = source[start:stop].to(wide, copy=True)
        still = None if mask is None else ~mask(source[start:stop])
        if still is not None:
            s.masked_fill_(still, 0.0)
        if direction.scaling is None:
            change(work, s, start, stop)
        else:
            work = direction.scaling.moved(work, lambda weights: change(weights, s, start, stop))  # noqa: B023
        if still is not None:
            work = torch.where(still, source[start:stop].to(wide), work)
        if theta.dtype == wide:
            target[start:stop] = work
        else:
            place = direction.place(start, stop)
            store(work, target[start:stop], direction.rounding_key(theta.dtype), place, back)
    if target.data_ptr() != out.data_ptr():
        out.copy_(target.view(out.shape))
