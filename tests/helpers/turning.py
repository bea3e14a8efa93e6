"""Runs whose first batches end with a higher loss than they had, and noise between batches that hides it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hf_helpers import differing, weights
from torch import Tensor, nn

from zo_core import SeedLog, replay
from zo_core.records import Rollback

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


def assert_went_back(said: str, start: nn.Module, trained: nn.Module, log: Path) -> None:
    """The last step of a run took its weights back to the beginning, and the log replays that.

    Args:
        said: what was logged.
        start: an untrained model.
        trained: the model at the end.
        log: the seed log of the run.
    """
    assert f"step {STEPS - 1}, the last one: on the batches of the first {FIRST} steps" in said
    before, after = weights(start), weights(trained)
    assert max((before[name] - after[name]).abs().max() for name in before) < 1e-5
    steps = SeedLog.read(log)
    assert [entry.rollback for entry in steps.steps] == [None] * (STEPS - 1) + [Rollback(0, 0.5)]
    replay(start, steps)
    assert differing(after, weights(start)) == []
