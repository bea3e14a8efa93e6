"""Two-sided directions in a part of the weights that is chosen once, in plain torch: an experiment.

DeepZero (arXiv 2310.02025) scores weights by GraSP, from zeroth-order estimates, and takes from these scores how many
weights of each layer move.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .rival_methods import Loss, moving

EPS = 1e-3


class Masked:
    """Signs in the kept weights alone.

    Args:
        model: changed in place.
        rate: learning rate.
        seed: of everything random.
        keep: the share of all weights that moves.
        how: which ones: "all", "random", "small" (in each tensor, Sparse-MeZO), "grasp" (those with the highest
            scores), "ratios" (as many of each tensor as "grasp" has there, at random), or "gradient" (the largest
            elements of the gradient of the first batch, by backpropagation: what scores could at best know).
        scored: directions that scores are made of. They take two steps each, of two forwards, in which nothing moves.
    """

    def __init__(
        self, model: nn.Module, rate: float, seed: int, *, how: str = "all", keep: float = 0.25, scored: int = 8
    ):
        self.parameters = moving(model)
        self.weights = [p.data for p in self.parameters]
        self.rate, self.keep, self.how, self.seed = rate, keep, how, seed
        self.generator = torch.Generator().manual_seed(seed)
        self.masks: list[Tensor] | None = None
        self.batches: list[Loss] = []
        self.sums = [[torch.zeros_like(w) for w in self.weights] for _ in range(2)]
        self.scored = scored if how in ("grasp", "ratios") else 0

    def __call__(self, loss: Loss) -> float:
        if len(self.batches) < 2 * self.scored:
            return self._score(loss)
        if self.masks is None:
            self.masks = self._choose(loss)
        z = [signs * mask for signs, mask in zip(self._signs(self.generator), self.masks, strict=True)]
        with torch.no_grad():
            g, value = self._slope(z, loss)
            for w, one in zip(self.weights, z, strict=True):
                w.sub_(one, alpha=self.rate * g)
        return value

    def _signs(self, generator: torch.Generator) -> list[Tensor]:
        return [torch.randint(0, 2, w.shape, generator=generator).float().mul_(2).sub_(1) for w in self.weights]

    def _slope(self, z: list[Tensor], loss: Loss) -> tuple[float, float]:
        before, found = [w.clone() for w in self.weights], []
        for sign in (EPS, -EPS):
            for w, start, one in zip(self.weights, before, z, strict=True):
                w.copy_(start).add_(one, alpha=sign)
            found.append(float(loss()))
        for w, start in zip(self.weights, before, strict=True):
            w.copy_(start)
        return (found[0] - found[1]) / (2 * EPS), sum(found) / 2

    @torch.no_grad()
    def _score(self, loss: Loss) -> float:
        """One direction of an estimate of the gradient, here, and later again a little further along it."""
        self.batches.append(loss)
        index, second = divmod(len(self.batches) - 1, self.scored)[::-1]
        z = self._signs(torch.Generator().manual_seed(1000 * self.seed + index))
        before = [w.clone() for w in self.weights]
        if second:
            length = torch.stack([total.norm() for total in self.sums[0]]).norm()
            for w, total in zip(self.weights, self.sums[0], strict=True):
                w.add_(total, alpha=float(self._far() / length))
        g, value = self._slope(z, self.batches[index])
        for w, start, total, one in zip(self.weights, before, self.sums[second], z, strict=True):
            w.copy_(start)
            total.add_(one, alpha=g)
        return value

    def _far(self) -> float:
        """How far apart the two estimates are: as far as a probe is."""
        return EPS * sum(w.numel() for w in self.weights) ** 0.5

    def _choose(self, loss: Loss) -> list[Tensor]:
        count = sum(w.numel() for w in self.weights)
        kept = round(self.keep * count)
        if self.how == "all":
            return [torch.ones_like(w) for w in self.weights]
        if self.how == "random":
            scores = [torch.rand(w.shape, generator=self.generator) for w in self.weights]
        elif self.how == "small":
            return [
                (w.abs() <= w.abs().flatten().kthvalue(max(1, round(self.keep * w.numel())))[0]).float()
                for w in self.weights
            ]
        elif self.how == "gradient":
            with torch.enable_grad():
                found = torch.autograd.grad(loss(), self.parameters, allow_unused=True)
            scores = [torch.zeros_like(w) if g is None else g.abs() for w, g in zip(self.weights, found, strict=True)]
        else:
            scores = [w * (b - a) for w, a, b in zip(self.weights, *self.sums, strict=True)]
        limit = torch.cat([s.flatten() for s in scores]).kthvalue(count - kept)[0]
        masks = [(s > limit).float() for s in scores]
        if self.how != "ratios":
            return masks
        return [self._random(mask) for mask in masks]

    def _random(self, mask: Tensor) -> Tensor:
        order = torch.randperm(mask.numel(), generator=self.generator)
        return mask.flatten()[order].view_as(mask)
