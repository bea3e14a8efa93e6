"""Laws of the last look by itself: what it keeps, and what it decides from the losses of then and now."""

from __future__ import annotations

import contextlib
import gc
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from models import closure, tiny
from torch import nn
from traces import same_bits, weights

from zo_core import SearchError, ZeroOrder, last_look
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
    assert held_bytes(lambda batch=batch: batch) == 80
    holder = nn.Module()
    holder.data = batch
    assert held_bytes(holder.forward) == 80


@pytest.mark.parametrize("accumulated", [1, 2])
def test_closures_that_read_what_their_loop_has_changed_have_no_look(
    accumulated: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(last_look, "PART", 1 / 2)
    found = []
    for looks in (True, False):
        model, kept = nn.Linear(8, 1), list[Any]()
        nn.init.constant_(model.weight, 0.1)
        nn.init.zeros_(model.bias)
        zo = ZeroOrder(model, lr=1e-2, brake="rollback")
        for step in range(16):
            if looks:
                zo.look_back(lambda: 16)
            for part in range(accumulated):
                x = torch.full((8,), (step + part + 1.0) / 16)
                kept.append(weakref.ref(x))
                zo.measure(lambda: (1.0 if step < 8 else -1.0) * model(x).sum())  # noqa: B023
            record = zo.optimizer.step()
            gc.collect()
            assert sum(each() is not None for each in kept) <= 2 * accumulated
        assert record.rollback is None
        found.append((record.as_dict(), weights(model)))
    assert found[0][0] == found[1][0]
    assert same_bits(found[0][1], found[1][1])
    (line,) = [message for message in caplog.messages if "the last look" in message]
    assert line.endswith(
        "measured; write zo.step(lambda step=step, x=x: ...), which keeps what it was measured with"
    ) or (accumulated == 2 and "lambda x=x: ..." in line)


def test_a_variable_that_changes_after_the_first_steps_leaves_the_look_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(last_look, "PART", 1 / 2)
    model, sign = tiny("mlp"), 1.0
    zo = ZeroOrder(model, lr=1e-3, brake="rollback")
    for step in range(16):
        zo.look_back(lambda: 16)
        sign = 1.0 if step < 8 else -3.0
        measured = closure("mlp", model, step)
        record = zo.step(lambda measured=measured: sign * measured())  # type: ignore[misc]  # noqa: B023
    assert record.rollback is None
    (line,) = [message for message in caplog.messages if "the last look" in message]
    assert ": sign changed after closures that read it were measured; write zo.step(lambda sign=sign: ...)" in line


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
