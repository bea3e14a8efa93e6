"""Law: what the brake sees and does is said once, and it touches nothing else."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch
from models import closure, tiny
from test_rollback import LR, brake_closure, rollbacks, train

from zo_core import ConfigError, ZeroOrder
from zo_core.brake.state import AGREEING

# What is said


@pytest.mark.parametrize("mode", ["auto", "warn"])
def test_a_bare_loop_says_so_and_goes_on(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    _, records, _ = train(None, tiny("mlp"), "mlp", brake=mode)
    _, others, _ = train(None, tiny("mlp"), "mlp", brake=None)
    assert rollbacks(records) == {}
    assert [record.probes for record in records] == [record.probes for record in others]
    lines = [line for line in caplog.messages if "the loss has risen" in line]
    assert len(lines) == 2
    assert "step 26: the loss has risen to 5" in lines[0]
    assert "around step 8" in lines[0]
    assert "brake='rollback' goes back" in lines[0]


def test_a_rollback_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    train(None, tiny("mlp"), "mlp", range(30))
    (line,) = [line for line in caplog.messages if "the loss has risen" in line]
    assert "step 26" in line
    assert "go back to those before step 8, and from here on the learning rate is 0.5 of what is set" in line


def test_a_torch_optimizer_is_only_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("mlp")
    zo = ZeroOrder(model, optimizer=torch.optim.SGD(model.parameters(), lr=LR), brake="rollback")
    _, records, _ = train(None, model, "mlp", zo=zo)
    assert rollbacks(records) == {}
    assert zo.optimizer.factor == 1.0
    assert "the updates of the rule 'torch' cannot be reverted" in caplog.text


@pytest.mark.parametrize("mode", ["rollback", "warn", None])
def test_losses_that_always_agree_are_said(mode: str | None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    model = tiny("mlp")
    zo = ZeroOrder(model, lr=LR, brake=mode)
    for _ in range(2 * AGREEING + 1):
        zo.step(lambda: model.head.weight.sum() * 0.0 + 38_000.0)
    lines = [line for line in caplog.messages if "have agreed exactly for" in line]
    assert [line.split()[9] for line in lines] == ([] if mode is None else ["32", "64"])


def test_trials_of_learning_rates_do_not_touch_the_brake() -> None:
    model = tiny("mlp")
    zo = ZeroOrder(model, lr=LR, brake="rollback")
    for step in range(20):
        zo.step(closure("mlp", model, step))
    before = zo.braking.saved()
    zo.optimizer.factor = 0.25
    with contextlib.suppress(ConfigError):  # whether or not a rate lowers the loss by now
        zo.suggest_lr([closure("mlp", model)])
    assert zo.braking.saved() == before
    assert zo.optimizer.factor == 0.25


def test_a_snapshot_restores_the_brake() -> None:
    model = tiny("mlp")
    zo, _, _ = train(None, model, "mlp", range(24))
    before, snapshot = zo.braking.saved(), zo.snapshot()
    for step in range(24, 30):
        zo.step(brake_closure("mlp", model, step))
    assert zo.optimizer.factor == 0.5
    snapshot.restore()
    assert (zo.braking.saved(), zo.optimizer.factor) == (before, 1.0)


def test_a_brake_that_is_none_of_these_is_an_error() -> None:
    with pytest.raises(ConfigError, match="brake='yes' is not known; write one of 'auto', 'rollback', 'warn', None"):
        ZeroOrder(tiny("mlp"), brake="yes")
