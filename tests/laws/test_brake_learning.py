"""Law: a rate that is good is never braked, and one that is far too high ends near the best loss that the run had."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from zo_core import StepRecord, ZeroOrder

#: A good rate for the task below; three times as much diverges within some hundred steps.
GOOD = 1e-2
WINDOW = 100


def train(lr: float, seed: int, steps: int) -> list[StepRecord]:
    """Trains a small network on digits, 64 to a step."""
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    zo = ZeroOrder(model, lr=lr, eps=1e-3, brake="rollback", seed=seed)
    records = []
    for _ in range(steps):
        rows = torch.randint(0, len(y), (64,))
        records.append(zo.step(lambda rows=rows: F.cross_entropy(model(x[rows]), y[rows])))
    return records


def windows(records: list[StepRecord]) -> np.ndarray:
    """Mean training losses of all windows of `WINDOW` consecutive steps."""
    return np.convolve(np.array([float(record) for record in records]), np.ones(WINDOW) / WINDOW, "valid")


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20))])
def test_a_good_rate_is_never_braked(seed: int) -> None:
    records = train(GOOD, seed, 400)
    assert not any(record.rollback for record in records)
    assert windows(records)[-1] < 0.95 * windows(records)[0]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
@pytest.mark.parametrize("times", [10, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_rate_that_is_far_too_high_ends_within_two_percent_of_the_best(times: int, seed: int) -> None:
    records = train(times * GOOD, seed, 1000)
    losses = windows(records)
    assert sum(record.rollback is not None for record in records) >= 2
    assert losses[-1] < 1.02 * losses.min()
    assert losses[-1] < 0.7 * records[0].loss
