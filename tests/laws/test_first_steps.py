"""Law: a closure that could never teach anything is noticed in the first steps, and a good one is left in peace."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import EVERY, batch, closure, tiny
from torch import Tensor, nn

from zo_core import ZeroOrder

SETTINGS: list[dict[str, Any]] = [{}, {"offload": "cpu"}, {"noise": "low_rank"}, {"estimator": "fzoo"}]
EVERYWHERE = pytest.mark.parametrize("settings", SETTINGS, ids=str)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "zo_core.first_steps" and r.levelno >= logging.WARNING]


def trained(loss: Callable[[nn.Module], Any], steps: int = 4, **settings: Any) -> ZeroOrder:
    model = tiny("llama")
    zo = ZeroOrder(model, lr=1e-3, **settings)
    for _ in range(steps):
        zo.step(lambda: loss(model))
    return zo


def without_slope(model: nn.Module) -> Tensor:
    loss = model(**batch("llama")).loss
    return torch.exp(loss - loss.detach())


@EVERYWHERE
def test_a_loss_that_has_the_same_value_whatever_the_weights_are(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    trained(without_slope, **settings)
    (message,) = said(caplog)
    assert "all losses of the first two steps agree exactly (1 in" in message
    assert "detach()" in message


@EVERYWHERE
def test_a_closure_that_uses_another_model(settings: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    other = tiny("llama")
    trained(lambda model: other(**batch("llama")).loss, **settings)
    first, second = said(caplog)
    assert "ran without any of the trained weights" in first
    assert "agree exactly" in second


@EVERYWHERE
def test_a_closure_that_waits_before_it_uses_the_model_is_left_in_peace(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    async def waits(model: nn.Module) -> Tensor:
        await asyncio.sleep(0)
        return closure("llama", model)()

    trained(waits, **settings)
    assert not said(caplog)


def test_a_closure_that_returns_a_constant(caplog: pytest.LogCaptureFixture) -> None:
    trained(lambda model: 0.5)
    assert "without any of the trained weights" in said(caplog)[0]


@EVERYWHERE
def test_a_closure_that_draws_another_batch_each_time(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    batches = itertools.count()
    trained(lambda model: model(**batch("llama", index=next(batches))).loss, **settings)
    (message,) = said(caplog)
    assert "at the same weights and with the same random numbers" in message
    assert "Draw the batch before the closure" in message


def test_a_generator_of_its_own_is_another_batch(caplog: pytest.LogCaptureFixture) -> None:
    generator = torch.Generator().manual_seed(0)
    trained(lambda model: model(**batch("llama")).loss * torch.rand((), generator=generator))
    assert "at the same weights" in said(caplog)[0]


@pytest.mark.parametrize("name", [name for name in EVERY if name != "scripted"])
@EVERYWHERE
def test_a_good_closure_hears_nothing(name: str, settings: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    if "offload" in settings and name not in ("llama", "opt", "bert", "t5"):
        pytest.skip("has no repeated layers")
    model = tiny(name)
    zo = ZeroOrder(model, lr=1e-4, dropout=True, **settings)
    for step in range(3):
        zo.step(closure(name, model, step))
    assert said(caplog) == []


def test_a_step_function_that_moves_at_last_hears_nothing_more(caplog: pytest.LogCaptureFixture) -> None:
    losses = iter([0.5, 0.5, 0.5, 0.25, 0.5, *[0.5] * 10])
    zo = trained(lambda model: (model(**batch("llama")), next(losses))[1], steps=6)
    assert zo.step_count == 6
    assert said(caplog) == []


def test_steps_without_a_signal_are_told_apart_from_those_that_were_skipped() -> None:
    model = tiny("llama")
    zo = ZeroOrder(model, lr=0.1, weight_decay=1.0)
    before = model.lm_head.weight.detach().clone()
    record = zo.step(lambda: without_slope(model))
    assert record.without_signal
    assert record.skipped is None
    assert torch.equal(model.lm_head.weight, before * torch.tensor(0.9))  # weight decay asks for no signal
    assert not zo.step(closure("llama", model)).without_signal


@pytest.mark.parametrize("settings", [{}, {"noise": "low_rank"}, {"offload": "cpu"}], ids=str)
def test_the_look_at_the_first_step_changes_no_number(settings: dict[str, Any]) -> None:
    records = []
    for looks in (True, False):
        model = tiny("llama")
        zo = ZeroOrder(model, lr=1e-3, dropout=True, **settings)
        if not looks:
            zo.first_steps = None
        torch.manual_seed(3)
        records.append([zo.step(closure("llama", model.train(), step)).as_dict() for step in range(3)])
    assert records[0] == records[1]
