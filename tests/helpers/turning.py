"""Runs whose first batches end with a higher loss than they had, and noise between batches that hides it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

#: Steps of one row each; the last one measures the first ones again.
STEPS, FIRST = 24, 8


class Turning(nn.Module):
    """What lowers the loss of later rows raises that of the first ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor, sign: Tensor, noise: Tensor) -> dict[str, Tensor]:
        return {"loss": (sign * self.layer(x).squeeze(-1) + noise).mean()}


def rows(turns: bool) -> list[dict[str, Any]]:
    """The rows of a run in their order; without turns all have one sign."""
    noise = torch.rand(STEPS, generator=torch.Generator().manual_seed(1)) * 5 + 100
    return [
        {"x": torch.ones(4), "sign": torch.tensor(1.0 if i < FIRST or not turns else -3.0), "noise": noise[i]}
        for i in range(STEPS)
    ]
