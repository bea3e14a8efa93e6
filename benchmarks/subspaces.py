"""Methods in random subspaces, in plain torch: experiments that are compared with the library's own.

A matrix moves along ``U V'``, whose right factor V, with orthonormal columns, is kept for a window of steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .rival_methods import Loss, moving

EPS = 1e-3
#: Coefficients of the quintic iteration that Muon uses.
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix ``[m, r]`` with orthonormal columns, roughly, by five Newton-Schulz iterations."""
    x = matrix.t() / (matrix.norm() + 1e-12)
    a, b, c = QUINTIC
    for _ in range(5):
        gram = x @ x.t()
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.t()


@dataclass
class Slot:
    """A weight with its bases, which are None for vectors, and its momentum in these coordinates."""

    weight: Tensor
    left: Tensor | None = None
    right: Tensor | None = None
    momentum: Tensor | None = None

    @property
    def matrix(self) -> bool:
        return self.weight.ndim == 2

    def whole(self, factor: Tensor) -> Tensor:
        """From coordinates to the shape of the weight."""
        if self.right is not None:
            factor = factor @ self.right.t()
        return factor if self.left is None else self.left @ factor


class Subspace:
    """Two-sided directions in subspaces.

    Args:
        model: changed in place.
        rate: learning rate; with ``muon`` the length of a step in each singular direction.
        seed: of everything random.
        rank: of the directions of matrices.
        count: directions in a step, which share their bases.
        refresh: steps of a window.
        beta: decay of the momentum, which is projected to the bases of the next window.
        both: whether the left factor is kept as well, and r x r numbers are drawn (SubZero, arXiv 2410.08989).
        muon: whether the momentum is orthogonalised (ZO-Muon, arXiv 2602.17155).
        even: whether it is only scaled, to the length that ``muon`` gives each weight.
    """

    def __init__(
        self,
        model: nn.Module,
        rate: float,
        seed: int,
        *,
        rank: int = 2,
        count: int = 1,
        refresh: int = 50,
        beta: float = 0.9,
        both: bool = False,
        muon: bool = False,
        even: bool = False,
    ):
        self.slots = [Slot(p.data) for p in moving(model)]
        self.rate, self.rank, self.count, self.refresh, self.beta = rate, rank, count, refresh, beta
        self.both, self.muon, self.even, self.done = both, muon, even, 0
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def turn(self, slot: Slot) -> None:
        """Draws new bases and projects the momentum to them."""
        old = slot.left, slot.right
        m, columns = slot.weight.shape
        slot.right = torch.linalg.qr(self.normal(columns, min(self.rank, columns)))[0]
        if self.both:
            slot.left = torch.linalg.qr(self.normal(m, min(self.rank, m)))[0]
        if slot.momentum is not None and old[1] is not None:
            slot.momentum = slot.momentum @ (old[1].t() @ slot.right)
            if old[0] is not None and slot.left is not None:
                slot.momentum = (slot.left.t() @ old[0]) @ slot.momentum

    def draw(self, slot: Slot) -> Tensor:
        """Coordinates of a direction whose elements have variance 1."""
        if slot.right is None:
            return self.normal(*slot.weight.shape)
        m, columns = slot.weight.shape
        rows = m if slot.left is None else slot.left.shape[1]
        scale = math.sqrt(columns / slot.right.shape[1] * (m / rows))
        return self.normal(rows, slot.right.shape[1]) * scale

    @torch.no_grad()
    def __call__(self, loss: Loss) -> float:
        if self.done % self.refresh == 0:
            for slot in self.slots:
                if slot.matrix:
                    self.turn(slot)
        self.done += 1
        before = [slot.weight.clone() for slot in self.slots]
        sums: list[Tensor] = []
        total = 0.0
        for _ in range(self.count):
            drawn = [self.draw(slot) for slot in self.slots]
            found = [self._at(before, drawn, sign * EPS, loss) for sign in (1.0, -1.0)]
            g = (found[0] - found[1]) / (2 * EPS) / self.count
            sums = [g * z for z in drawn] if not sums else [s + g * z for s, z in zip(sums, drawn, strict=True)]
            total += sum(found) / 2 / self.count
        for slot, start, estimate in zip(self.slots, before, sums, strict=True):
            slot.momentum = estimate if slot.momentum is None else self.beta * slot.momentum + estimate
            slot.weight.copy_(start).sub_(slot.whole(self._moved(slot)), alpha=self.rate)
        return total

    def _moved(self, slot: Slot) -> Tensor:
        assert slot.momentum is not None
        if not self.muon and not self.even:
            return slot.momentum
        if self.muon and slot.matrix:
            return orthogonal(slot.momentum)
        length = math.sqrt(slot.momentum.shape[1]) if slot.matrix else 1.0
        return slot.momentum * (length / (slot.momentum.norm() + 1e-12))

    def _at(self, before: list[Tensor], drawn: list[Tensor], scale: float, loss: Loss) -> float:
        for slot, start, z in zip(self.slots, before, drawn, strict=True):
            slot.weight.copy_(start).add_(slot.whole(z), alpha=scale)
        return float(loss())


class HizooL:
    """Directions scaled by an estimate of the curvature, kept as a row and a column (HiZOO-L, arXiv 2402.15173).

    Args:
        model: changed in place.
        rate: learning rate.
        seed: of the directions.
        smooth: how fast the curvature is followed.
    """

    def __init__(self, model: nn.Module, rate: float, seed: int, *, smooth: float = 1e-6):
        self.weights = [p.data for p in moving(model)]
        self.rows = [torch.ones(w.shape[:1] if w.ndim == 2 else w.shape) for w in self.weights]
        self.columns = [torch.ones(w.shape[1:]) for w in self.weights]
        self.rate, self.smooth = rate, smooth
        self.generator = torch.Generator().manual_seed(seed)

    def curvature(self, index: int) -> Tensor:
        if self.weights[index].ndim != 2:
            return self.rows[index]
        row = self.rows[index]
        return row[:, None] * self.columns[index] / row.mean()

    @torch.no_grad()
    def __call__(self, loss: Loss) -> float:
        before = [w.clone() for w in self.weights]
        curved = [self.curvature(index) for index in range(len(before))]
        u = [torch.randn(w.shape, generator=self.generator) for w in before]
        z = [one / h.sqrt() for one, h in zip(u, curved, strict=True)]
        middle = float(loss())
        found = []
        for sign in (EPS, -EPS):
            for w, start, one in zip(self.weights, before, z, strict=True):
                w.copy_(start).add_(one, alpha=sign)
            found.append(float(loss()))
        second = abs(found[0] + found[1] - 2 * middle) / (2 * EPS**2)
        g = (found[0] - found[1]) / (2 * EPS)
        for index, (w, start) in enumerate(zip(self.weights, before, strict=True)):
            w.copy_(start).sub_(z[index], alpha=self.rate * g)
            new = (1 - self.smooth) * curved[index] + self.smooth * second * curved[index] * u[index].square()
            self.rows[index] = new.mean(1) if w.ndim == 2 else new
            self.columns[index] = new.mean(0) if w.ndim == 2 else self.columns[index]
        return sum(found) / 2
