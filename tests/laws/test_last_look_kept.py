"""Laws of the last look by itself: what it keeps, and what it decides from the losses of then and now."""

from __future__ import annotations

import contextlib
from functools import partial

import pytest
import torch
from models import closure, tiny
from torch import nn

from zo_core import SearchError, ZeroOrder
from zo_core.last_look import LastLook, compared, held_bytes


def test_higher_on_average_is_worse_unless_the_first_of_the_steps_have_learnt() -> None:
    assert compared([(1.0, 1.0)] * 8) is None
    assert compared([(1.0, 0.9)] * 4 + [(1.0, 1.2)] * 4) is None  # above on average, and below at first
    assert compared([(2.0, 1.02)] + [(1.0, 1.02)] * 47) is None  # a fall in the very first step, and a level since
    found = compared([(1.0, 1.2)] * 5 + [(1.0, 0.9)] * 3)
    assert found is not None
    assert (found.best, found.reason, found.count) == (1.0, "higher in 5 of them", 8)
    assert compared([(1.0, float("nan"))] * 8) is not None
    assert compared([(1.0, float("inf"))] * 8) is not None


@pytest.mark.parametrize(("steps", "count"), [(1, 0), (159, 0), (160, 8), (960, 48), (10**6, 64)])
def test_a_look_takes_a_twentieth_of_a_run_at_most(steps: int, count: int) -> None:
    look = LastLook(steps, [])
    assert look.count == count
    assert look.due(steps - 1) == bool(count)
    assert not look.due(steps - 2)


def test_bytes_of_batches_are_counted() -> None:
    batch = {"x": torch.zeros(10), "y": [torch.zeros(5, dtype=torch.int64)], "name": "a"}
    assert held_bytes(partial(print, batch, more=torch.zeros(1))) == 84
    assert held_bytes(lambda: batch) == 0
    holder = nn.Module()
    holder.data = batch
    assert held_bytes(holder.forward) == 80


def test_trials_of_learning_rates_are_not_looked_at() -> None:
    model = tiny("mlp")
    zo = ZeroOrder(model, lr=1e-3, brake="rollback")
    zo.look_back(lambda: 1000)
    look = zo.look
    assert look is not None
    with contextlib.suppress(SearchError):  # whether or not a rate lowers the loss
        zo.suggest_lr([closure("mlp", model, index) for index in range(4)], forwards=200)
    assert zo.look is look
    assert look.kept == []
