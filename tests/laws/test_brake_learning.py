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


@pytest.mark.parametrize("rise", [5.0, 0.5])
def test_another_loss_is_not_taken_for_a_bad_step_for_ever(rise: float, caplog: pytest.LogCaptureFixture) -> None:
    """From step 200 on there are other labels and another term in the loss: no weights have the losses of before."""
    torch.manual_seed(0)
    model = nn.Linear(6, 1)
    zo = ZeroOrder(model, lr=1e-2, brake="rollback", seed=1)
    wanted, x = torch.randn(2, 1, 6), torch.randn(1200, 32, 6)
    for step in range(1200):
        y = x[step] @ wanted[int(step >= 200)].t() + 0.5 * torch.randn(32, 1)
        record = zo.step(lambda step=step, y=y: F.mse_loss(model(x[step]), y) + rise * (step >= 200))
    said = [entry.getMessage() for entry in caplog.records if "it is another loss now" in entry.getMessage()]
    assert len(said) == 1
    assert zo.optimizer.factor >= 0.25, "each time that it goes back halves the rate"
    assert abs(record.loss - rise - 0.25) < 0.25, "it learns the new labels, up to their noise"
