"""Directions of low rank: ``z = U V^T / sqrt(r)``, with V kept for a window of steps (LOZO, arXiv 2410.07698).

A weight ``[m, ...]`` counts as a matrix with m rows, and its other dimensions are flattened to columns. U ``[m, r]``
is new every step, V ``[columns, r]`` every ``refresh`` steps, and both hold signs. A linear layer can then
be run at ``W + eps z`` without forming that sum, as ``x W^T + eps (x V) U^T / sqrt(r)``, and all updates of
a window add up in one factor ``[m, r]``. Tensors with one dimension have ordinary signs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache import ByteCache, kept, workspace
from .alternatives import Alternatives
from .base import NOISES, Noise
from .changes import flush
from .direction import CPU_CHUNK, PLAIN, Direction, Passes, Scaling, Terms, float32
from .hashing import BASIS, DIRECTION, derive_seed, first_words, prepare_words, sent, stream_key
from .rademacher import Rademacher

#: The elements of U and V, and of tensors with one dimension.
SIGNS = Rademacher()

#: The seed of U is in the low bits of a direction's seed, that of V above them.
SEED_BITS = 64

#: Maximum memory for the factors of a step, and for those of a window.
LEFT_BYTES = RIGHT_BYTES = 64 << 20

#: U of the step: both sides of a probe and the update use the same.
_lefts: ByteCache[Tensor] = ByteCache(LEFT_BYTES, per_step=True)

#: V of the window, whose steps all use the same.
_rights: ByteCache[Tensor] = ByteCache(RIGHT_BYTES)


@NOISES.register
@dataclass(frozen=True)
class LowRank(Noise):
    """Matrices of rank ``rank`` from signs; an element has mean 0, variance 1 and fourth moment 3 - 2 / rank.

    For a matrix of d elements the estimator over n directions has the second moment
    ``(d + n + kappa - 2) / n * |grad|^2`` with ``kappa = 3 - 2 / rank``: that of full-rank signs for rank 1,
    approaching that of normal noise for large ranks. (With normal factors it would be larger.) Keeping V
    does not change it, but the steps of a window then search one subspace.

    Attributes:
        rank: r, at least 1.
        refresh: number of steps for which V is kept; None keeps it for the whole run, and the total update
            of a matrix then has rank r.
    """

    name: ClassVar[str] = "low_rank"
    rank: int = 2
    refresh: int | None = 50

    def __post_init__(self) -> None:
        for name, value, optional in (("rank", self.rank, False), ("refresh", self.refresh, True)):
            if value is None and optional:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                wanted = "a whole number of at least 1" + (", or None to keep V for the whole run" if optional else "")
                raise ValueError(f"{name}={value!r} must be {wanted}, for example {2 if name == 'rank' else 50}")

    @property
    def matrix_kurtosis(self) -> float:
        """Fourth standardised moment of an element of a matrix."""
        return 3.0 - 2.0 / self.rank

    def seed(self, base: int, step: int, direction: int) -> int:
        """The seed of U in the low 64 bits, and above them that of V, derived from the window's index."""
        window = 0 if self.refresh is None else step // self.refresh
        return derive_seed(base, window, direction) << SEED_BITS | derive_seed(base, step, direction)

    def direction(self, slot: str, shape: torch.Size, terms: Terms, passes: Passes = PLAIN) -> Direction:
        if self.rank_of(shape, passes.scaling) is None:
            return SIGNS.direction(slot, shape, terms, passes)
        return LowRankDirection(SIGNS, slot, terms, passes.rounding_seed, factors_of=self, shape=shape)

    def rank_of(self, shape: torch.Size, scaling: Scaling | None = None) -> int | None:
        return self.rank if len(shape) > 1 and shape.numel() > 0 and scaling is None else None

    def words_of(self, shape: torch.Size) -> int:
        return SIGNS.words_of(shape)

    def prepare(self, seeds: Sequence[int], slots: Sequence[tuple[str, torch.Size]], device: torch.device) -> None:
        vectors = [(key, shape) for key, shape in slots if self.rank_of(shape) is None and shape.numel()]
        prepare_words(
            [stream_key(seed, key, DIRECTION) for seed in seeds for key, _ in vectors],
            [SIGNS.words_of(shape) for _ in seeds for _, shape in vectors],
            device,
        )
        shapes = [(key, (shape[0], self.rank)) for key, shape in slots if self.rank_of(shape) is not None]
        names = [((seed,), key, shape, device) for seed in seeds for key, shape in shapes]
        names = [name for name in names if _lefts.get(name) is None]
        if not names:
            return
        counts = [SIGNS.words_of(torch.Size(shape)) for _, _, shape, _ in names]
        bits = first_words([stream_key(seed, key, DIRECTION) for (seed,), key, *_ in names], counts, device)
        with torch.inference_mode(False):
            values = torch.empty(len(bits) * SIGNS.values_per_word, dtype=torch.float32, device=device)
        SIGNS.expand(bits, 1.0, values)
        pieces = values.split([count * SIGNS.values_per_word for count in counts])
        for name, piece in zip(names, pieces, strict=True):
            shape = name[2]
            _lefts.put(name, piece[: shape[0] * shape[1]].view(shape))

    def forget(self, seeds: Sequence[int], late: bool = False) -> None:
        super().forget(seeds, late)
        window = {basis(seed) for seed in seeds}
        _rights.keep(lambda name: window.issuperset(name[0]))

    def left(self, seed: int, slot: str, shape: torch.Size, device: torch.device) -> Tensor:
        """U, float32 ``[m, r]``; do not write to it."""
        return self.lefts((seed,), slot, shape, device)

    def lefts(self, seeds: tuple[int, ...], slot: str, shape: torch.Size, device: torch.device) -> Tensor:
        """Several U side by side, float32 ``[m, len(seeds) * r]``; do not write to it."""
        name = (seeds, slot, (shape[0], self.rank), device)
        found = _lefts.get(name)
        if found is None:
            if len(seeds) == 1:
                found = self._signs(seeds[0], slot, (shape[0], self.rank), DIRECTION, device)
            else:
                found = joined([self.left(seed, slot, shape, device) for seed in seeds], 1)
            _lefts.put(name, found)
        return found

    def right(self, seed: int, slot: str, shape: torch.Size, device: torch.device) -> Tensor:
        """V, transposed, float32 ``[r, columns]``; do not write to it."""
        return self.rights((basis(seed),), slot, shape, device)

    def rights(self, bases: tuple[int, ...], slot: str, shape: torch.Size, device: torch.device) -> Tensor:
        """Several V, transposed and stacked, float32 ``[len(bases) * r, columns]``; do not write to it."""
        size = (self.rank, shape[1:].numel())
        name = (bases, slot, size, device)
        found = _rights.get(name)
        if found is None:
            if len(bases) == 1:
                found = self._signs(bases[0], slot, size, BASIS, device)
            else:
                found = joined([self.rights((one,), slot, shape, device) for one in bases], 0)
            _rights.put(name, found)
        return found

    def _signs(self, seed: int, slot: str, shape: tuple[int, int], purpose: int, device: torch.device) -> Tensor:
        with torch.inference_mode(False):
            return SIGNS.z(seed, slot, 0, shape[0] * shape[1], device, purpose=purpose).view(shape)


def joined(parts: list[Tensor], dim: int) -> Tensor:
    """``torch.cat`` for a result that is cached, hence not an inference tensor."""
    with torch.inference_mode(False):
        return torch.cat(parts, dim)


def basis(seed: int) -> int:
    """The part of a direction's seed that V depends on."""
    return seed >> SEED_BITS


@dataclass(frozen=True)
class LowRankDirection(Direction):
    """``s = sum over k of left[:, k] right[k, :]`` for a matrix slot, summed from left to right in float32.

    A term ``(seed, c)`` gives r columns ``round(c / sqrt(r)) U`` and as many rows ``V^T``; those of ``base``
    come first. All entries of ``right`` are signs, so every product is exact. ``terms`` may be empty.

    Attributes:
        factors_of: the noise that makes the factors.
        shape: shape of the slot.
        base: factors ``[m, K]`` and ``[K, columns]`` of the pending updates, or None.
        bases: the bases (see `basis`) whose V are the rows of the second of these factors.
        decay: factor for the weights, in addition to the ``decay`` of `add_to`.
    """

    factors_of: LowRank = field(default_factory=LowRank)
    shape: torch.Size = field(default_factory=torch.Size)
    base: tuple[Tensor, Tensor] | None = None
    bases: tuple[int, ...] = ()
    decay: float = 1.0

    @property
    def still(self) -> bool:
        return not self.terms and self.base is None

    def base_on(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """``base`` where the weights are that it is added to: the host, if the store of a streamed model is read."""
        return None if self.base is None else (self.base[0].to(device), self.base[1].to(device))

    def factors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``left`` ``[m, K]`` and ``right`` ``[K, columns]``, float32."""
        noise = self.factors_of
        base = self.base_on(device)
        lefts, rights = ([], []) if base is None else ([base[0]], [base[1]])
        for seed, c in self.terms:
            lefts.append(noise.left(seed, self.slot, self.shape, device) * float32(c / math.sqrt(noise.rank)))
            rights.append(noise.right(seed, self.slot, self.shape, device))
        return (lefts[0], rights[0]) if len(lefts) == 1 else (torch.cat(lefts, 1), torch.cat(rights))

    def factors_in(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """As `factors`, in ``dtype``; float32 and float64 add terms that share the V of ``base`` to its columns.

        In 16 bits they keep columns of their own: pending updates are so small beside eps that a sum would lose them.
        """
        shared = all(self.bases == (basis(seed),) for seed, _ in self.terms)
        if self.base is None or not shared or dtype not in (torch.float32, torch.float64):
            left, right = self.factors(device)
            return left.to(dtype), right.to(dtype)
        noise = self.factors_of
        left, right = self.base[0].to(device, dtype), self.base[1].to(device, dtype)
        for seed, c in self.terms:
            term = noise.left(seed, self.slot, self.shape, device).to(dtype)
            left = torch.add(left, term, alpha=float32(c / math.sqrt(noise.rank)))
        return left, right

    def chunks(self, numel: int, device: torch.device) -> Iterator[tuple[int, int, Tensor]]:
        left, right = self.factors(device)
        columns = right.shape[1]
        size = CPU_CHUNK if device.type == "cpu" else 16 * CPU_CHUNK
        for start in range(0, numel, size):
            stop = min(start + size, numel)
            first, last = start // columns, -(-stop // columns)
            rows = left[first:last]
            total = workspace("sum", (last - first) * columns, device).view(last - first, columns)
            torch.mul(rows[:, :1], right[0], out=total)
            for k in range(1, len(right)):
                term = workspace("term", (last - first) * columns, device).view(last - first, columns)
                total.add_(torch.mul(rows[:, k : k + 1], right[k], out=term))
            yield start, stop, total.view(-1)[start - first * columns : stop - first * columns]

    def add_to(self, theta: Tensor, decay: float = 1.0, out: Tensor | None = None) -> Tensor:
        out = theta if out is None else out
        flush()
        self._add_eager(theta, float32(self.decay * decay), out)
        return out

    @property
    def _signs_alone(self) -> bool:
        return False


@dataclass(frozen=True)
class FactorDirection(Direction):
    """The direction of the left factor of a window: ``round(c / sqrt(r)) U`` for each term.

    Attributes:
        factors_of: the noise that makes the factors.
        shape: shape of the slot; the factor is ``[m, len(terms) * r]``.
    """

    factors_of: LowRank = field(default_factory=LowRank)
    shape: torch.Size = field(default_factory=torch.Size)

    def chunks(self, numel: int, device: torch.device) -> Iterator[tuple[int, int, Tensor]]:
        noise = self.factors_of
        left = noise.lefts(tuple(seed for seed, _ in self.terms), self.slot, self.shape, device)
        yield 0, numel, (left * columns(tuple(c for _, c in self.terms), noise.rank, device)).view(-1)


def stacked_factors(
    alternatives: Alternatives, device: torch.device, rows: Tensor | None = None, apart: bool = False
) -> tuple[Tensor, Tensor]:
    """Factors of the sums of ``base`` and each of the terms; these sums share their right factor.

    Args:
        alternatives: the directions of a matrix.
        device: where to compute.
        rows: indices of the rows to return, ``[m']``; None for all m.
        apart: keep the columns of base and terms apart, for factors that will be rounded to 16 bits: pending
            updates are so small beside eps that a sum would lose them.

    Returns:
        ``lefts`` ``[len(terms), m, K]`` and ``right`` ``[K, columns]``, float32: the sum with term i is
        ``lefts[i] right``. A term whose basis is among the ``bases`` has columns of its own only if ``apart``.
        The next call for this device overwrites ``lefts``.
    """
    direction = alternatives.common
    assert isinstance(direction, LowRankDirection)
    noise, slot, shape = direction.factors_of, direction.slot, direction.shape
    seeds, bases, factor = _layout(direction.bases, alternatives.terms, noise.rank, device, apart)
    left = noise.lefts(seeds, slot, shape, device)
    signs = left if rows is None else left[rows]
    # Fresh memory of this size would cost page faults at every matrix.
    result = workspace("lefts", len(factor) * signs.numel(), device).view(len(factor), *signs.shape)
    waiting = direction.base_on(device)
    if waiting is None:
        torch.mul(signs, factor, out=result)
    else:
        base = waiting[0] if rows is None else waiting[0][rows]
        missing = signs.shape[1] - base.shape[1]
        torch.addcmul(F.pad(base, (0, missing)) if missing else base, factor, signs, out=result)
    return result, noise.rights(bases, slot, shape, device)


@kept(1 << 20, per_step=True)
def _layout(
    bases: tuple[int, ...], terms: tuple[tuple[int, float], ...], rank: int, device: torch.device, apart: bool
) -> tuple[tuple[int, ...], tuple[int, ...], Tensor]:
    """Assigns columns to ``terms``: r for each basis, those of ``bases`` first.

    Returns:
        For each basis a seed whose U may use its columns; the bases; and the factor of every column of U in
        each sum, 0 where the sum does not contain it, ``[len(terms), 1, K]``.
    """
    found, places = list(bases), dict[int, int]()
    for seed, _ in terms:
        if seed not in places:
            free = (k for k, one in enumerate(found) if one == basis(seed) and k not in places.values())
            places[seed] = len(found) if apart else next(free, len(found))
            if places[seed] == len(found):
                found.append(basis(seed))
    seeds = {place: seed for seed, place in places.items()}
    scales = [[0.0] * (rank * len(found)) for _ in terms]
    for row, (seed, c) in zip(scales, terms, strict=True):
        first = places[seed] * rank
        row[first : first + rank] = [float32(c / math.sqrt(rank))] * rank
    with torch.inference_mode(False):
        factor = sent(scales, device).unsqueeze(1)
    return tuple(seeds.get(place, terms[0][0]) for place in range(len(found))), tuple(found), factor


@kept(1 << 20, per_step=True)
def columns(values: tuple[float, ...], rank: int, device: torch.device) -> Tensor:
    """``round(value / sqrt(r))`` for r columns each, float32 ``[len(values) * r]``."""
    with torch.inference_mode(False):
        scales = [float32(value / math.sqrt(rank)) for value in values]
        return sent(scales, device).repeat_interleave(rank)
