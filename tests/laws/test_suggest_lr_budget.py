"""Law: the search for a learning rate keeps to its forwards, and takes neither noise nor a plateau for learning."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from models import closure, tiny
from torch import Tensor, nn

from zo_core import ConfigError, SearchError, ZeroOrder, suggest_lr
from zo_core.defaults import NEWTON


def bowl(dimension: int) -> tuple[nn.ParameterList, Tensor]:
    model = nn.ParameterList([torch.randn(dimension, generator=torch.Generator().manual_seed(0))])
    return model, model[0].detach().square().sum()


def counted(run: Callable[[], Any], calls: list[int]) -> Callable[[], Any]:
    def count() -> Any:
        calls.append(1)
        return run()

    return count


# The budget


@pytest.mark.parametrize("estimator", ["spsa", "fzoo"])
@pytest.mark.parametrize("forwards", [128, 300, 512])
def test_no_more_forwards_than_allowed(forwards: int, estimator: str) -> None:
    model, size = bowl(100)
    calls: list[int] = []
    loss = counted(lambda: model[0].square().sum() / size, calls)
    found = suggest_lr(model, [loss] * 8, estimator={"name": estimator}, num_probes=2, forwards=forwards)
    assert found.forwards == len(calls)
    assert forwards / 4 < len(calls) <= forwards


@pytest.mark.parametrize("steps", [2_560, 100_000])
def test_at_most_a_tenth_of_the_run(steps: int) -> None:
    model, size = bowl(100)
    calls: list[int] = []
    loss = counted(lambda: model[0].square().sum() / size, calls)
    found = suggest_lr(model, [loss] * 8, steps=steps)
    assert len(calls) == found.forwards <= 512
    assert found.steps == steps


def test_a_run_has_to_be_long_enough_for_a_search() -> None:
    model, calls = tiny("mlp"), []
    with pytest.raises(
        SearchError, match=r"^511 forwards, a tenth of what 2559 steps take, are too few .* takes 512\);"
    ):
        suggest_lr(model, counted(closure("mlp", model), calls), steps=2_559)
    assert not calls
    assert suggest_lr(model, counted(closure("mlp", model), calls), steps=2_559, forwards=128).forwards <= 128


def test_a_longer_run_gets_a_lower_rate() -> None:
    model, size = bowl(100)
    rates = [suggest_lr(model, lambda: model[0].square().sum() / size, steps=n).lr for n in (5_000, 500_000)]
    assert rates[1] < rates[0] / 5.0


def test_too_few_forwards() -> None:
    model, calls = tiny("mlp"), []
    with pytest.raises(SearchError, match=r"99 forwards are too few .* pass forwards=128 or more"):
        suggest_lr(model, counted(closure("mlp", model), calls), forwards=99)
    assert not calls


@pytest.mark.parametrize("steps", [300, 2_559])
def test_a_run_that_is_too_short_takes_the_default(steps: int, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("mlp")
    zo = ZeroOrder(model, lr="auto")
    before = zo.lr
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            zo.find_lr(lambda: nullcontext([closure("mlp", model)]), steps=steps)
    assert zo.lr == before
    assert zo.suggestion is None
    assert len(caplog.messages) == 1
    assert "the learning rate is" in caplog.messages[0]
    assert f"a tenth of what {steps} steps take" in caplog.messages[0]
    assert "better than the default" in caplog.messages[0]


def test_one_line_says_what_was_found(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    model, size = bowl(100)
    zo = ZeroOrder(model, lr="auto")
    with caplog.at_level(logging.INFO):
        zo.step(lambda: model[0].square().sum() / size)
    found = zo.suggestion
    assert found is not None
    (line,) = caplog.messages
    assert line.startswith(
        f"learning rate {found.lr:.2g}, found by {found.forwards} forwards for a run of {found.steps} "
    )
    assert f"from a loss of {found.loss:.4g}" in str(found)
    assert capfd.readouterr().err == ""  # the bar is for terminals


# What is no decrease


def collapsing(model: nn.ParameterList, size: Tensor) -> Tensor:
    """Falls from 0.85 towards 0 where the weights vanish, and to 0.7 where they are so large that only that counts."""
    q = 0.85 * model[0].square().sum() / size
    return torch.where(q < 1.0, q, 1.0 - 0.3 * (1.0 - 1.0 / q))


@pytest.mark.parametrize("batches", [1, 3, 8])
def test_a_plateau_is_no_result(batches: int) -> None:
    """From 0.1 to 1e9 every rate gives the collapsed loss, which is less than a short trial reaches at a good rate."""
    model, size = bowl(400)
    found = suggest_lr(model, [lambda: collapsing(model, size)] * batches)
    per_step = size / 2.0 / 0.85  # the rate is that of the loss, not of x^2 / 2
    assert 0.02 / 400 < found.lr / per_step < 1.0 / 400
    assert not [trial for trial in found.curve if trial.lr > per_step and trial.learnt]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("batches", [1, 8])
def test_noise_is_no_decrease(seed: int, batches: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model, _ = bowl(10)
    with pytest.raises(ConfigError, match="no learning rate lowers the loss"):
        suggest_lr(model, [lambda: 1.0 + 0.1 * torch.randn((), generator=generator)] * batches)


def test_one_sample_is_no_decrease() -> None:
    """An error rate on 8 batches of 225 samples, of which one changes sides as soon as the weights move."""
    model, _ = bowl(10)
    start = model[0].detach().clone()

    def wrong(index: int) -> Tensor:
        return torch.tensor(112.0 - (index == 0 and not torch.equal(model[0], start))) / 225.0

    with pytest.raises(ConfigError, match="no learning rate lowers the loss"):
        suggest_lr(model, [lambda index=index: wrong(index) for index in range(8)])  # type: ignore[misc]


def test_too_little_evidence_in_a_short_run() -> None:
    generator = torch.Generator().manual_seed(0)
    model, _ = bowl(10)
    with pytest.raises(SearchError, match=r"150 forwards, .* have shown no learning rate"):
        suggest_lr(model, [lambda: 1.0 + 0.1 * torch.randn((), generator=generator)] * 8, forwards=150)


def test_a_run_whose_search_finds_only_noise_takes_a_quarter_of_the_default_rate(
    caplog: pytest.LogCaptureFixture,
) -> None:
    generator = torch.Generator().manual_seed(0)
    model, _ = bowl(10)
    zo = ZeroOrder(model, lr="auto")
    zo.step(lambda: 1.0 + 0.1 * torch.randn((), generator=generator))
    assert (zo.lr, zo.suggestion) == (NEWTON / 4, None)
    assert [line for line in caplog.messages if line.startswith("the learning rate is 0.062: ")]


# No trace


class Centred(nn.Module):
    """A loss around a running mean, in a buffer, with a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(20, generator=torch.Generator().manual_seed(0)))
        self.register_buffer("centre", torch.zeros(20))
        self.count = 0

    def forward(self) -> Tensor:
        self.centre = 0.9 * self.centre + 0.1 * self.weight.detach()
        self.count += 1
        return (self.weight - 0.5 * self.centre).square().sum()


def test_buffers_and_attributes_are_as_before() -> None:
    model = Centred()
    suggest_lr(model, model)
    assert torch.equal(model.centre, torch.zeros(20))
    assert model.count == 0


def plain(engine: ZeroOrder) -> dict[str, Any]:
    return {name: value for name, value in vars(engine).items() if isinstance(value, (int, float, str, type(None)))}


@pytest.mark.parametrize("noise", ["rademacher", "low_rank"])
def test_the_engine_is_as_before(noise: str) -> None:
    """All plain attributes: one that steps change and that is new belongs in `CHANGED_BY_STEPS`."""
    model = tiny("mlp")
    zo = ZeroOrder(model, noise=noise)
    zo.step(closure("mlp", model))
    before = plain(zo), zo.listeners, zo.optimizer.state_dict()["param_groups"]
    curves = zo.curves.buckets, zo.curves.clock.forwards
    zo.suggest_lr([closure("mlp", model, index) for index in range(2)])
    assert (plain(zo), zo.listeners, zo.optimizer.state_dict()["param_groups"]) == before
    assert (zo.curves.buckets, zo.curves.clock.forwards) == curves


@pytest.mark.parametrize("calls", [3, 20, 90])
def test_interrupted_at(calls: int) -> None:
    models = [tiny("mlp"), tiny("mlp")]
    engines = [ZeroOrder(model, rule="momentum", noise="low_rank") for model in models]
    for step in range(4):
        if step == 2:
            run, count = closure("mlp", models[1]), itertools.count()

            def failing(run: Callable[[], Any] = run, count: Any = count) -> Any:
                if next(count) == calls:
                    raise KeyboardInterrupt
                return run()

            with pytest.raises(KeyboardInterrupt):
                engines[1].suggest_lr([failing])
        for model, zo in zip(models, engines, strict=True):
            zo.step(closure("mlp", model, step))
    assert all(map(torch.equal, models[0].state_dict().values(), models[1].state_dict().values()))
