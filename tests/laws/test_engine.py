"""Law: the engine turns losses into one update per step, however the losses come in, and says what it did."""

from __future__ import annotations

import copy
import json
import logging
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from models import closure, tiny
from torch import Tensor, nn
from traces import left_as_found, same_bits, weights

from zo_core import ESTIMATORS, NOISES, RULES, Fzoo, Momentum, Probe, StepRecord, ZeroOrder, ZOConfig
from zo_core.defaults import default_lr
from zo_core.noise.direction import float32

LR, EPS = 1e-2, 1e-2
OWN_RULES = [name for name in RULES if not RULES.resolve(name).wants_optimizer]


# Micro-batches


@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if name != "forward_grad"])  # see its own test
def test_measuring_micro_batches_is_measuring_their_sum(estimator: str) -> None:
    model, other = tiny("mlp"), tiny("mlp")
    pieces, whole = (ZeroOrder(m, lr=LR, eps=EPS, estimator=estimator) for m in (model, other))
    for _ in range(3):
        means = [pieces.measure(closure("mlp", model, index)) for index in range(4)]
        assert all(mean.dtype == torch.float32 and mean.shape == () for mean in means)
        record = pieces.optimizer.step()
        # The engine sums in float64, in the order of the calls, so the same sum gives the same bits.
        expected = whole.step(lambda: sum(closure("mlp", other, index)().double() for index in range(4)))
        assert repr(record) == repr(expected)  # NaN included
    assert same_bits(weights(model), weights(other))


def test_all_micro_batches_of_a_step_see_the_same_directions_and_the_next_step_others() -> None:
    model = tiny("mlp")
    zo = ZeroOrder(model, lr=0.0)
    seen: list[Tensor] = []

    def loss() -> Tensor:
        seen.append(model.head.bias.detach() + 0)
        return closure("mlp", model)()

    for _ in range(2):
        zo.measure(loss)
        zo.measure(loss)
        zo.optimizer.step()
    del seen[0]  # the first step measures one of its points twice
    first, again, second, _ = (torch.stack(seen[i : i + 2]) for i in range(0, 8, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_measuring_alone_changes_nothing_and_can_be_discarded() -> None:
    model = tiny("mlp")
    zo = ZeroOrder(model, lr=LR)
    with left_as_found(model):
        zo.measure(lambda: closure("mlp", model, 1)() * 100)
    zo.discard()
    found = zo.step(closure("mlp", model))
    other = tiny("mlp")
    assert found.as_dict() == ZeroOrder(other, lr=LR).step(closure("mlp", other)).as_dict()


def test_a_micro_batch_that_fails_takes_the_whole_step_with_it() -> None:
    model = tiny("mlp")
    zo = ZeroOrder(model, lr=LR)
    zo.measure(lambda: closure("mlp", model, 1)() * 100)
    with pytest.raises(ZeroDivisionError):
        zo.measure(lambda: 1 / 0)
    found = zo.step(closure("mlp", model))
    other = tiny("mlp")
    assert found.as_dict() == ZeroOrder(other, lr=LR).step(closure("mlp", other)).as_dict()


def test_the_optimizer_measures_a_closure_like_torch_optimizers_do() -> None:
    model, other = tiny("mlp"), tiny("mlp")
    zo, expected = ZeroOrder(model, lr=LR), ZeroOrder(other, lr=LR)
    record = zo.optimizer.step(closure("mlp", model))
    assert record.as_dict() == expected.step(closure("mlp", other)).as_dict()
    assert same_bits(weights(model), weights(other))


# The record


def test_a_record_is_a_float() -> None:
    record = ZeroOrder(model := tiny("mlp"), lr=LR).step(closure("mlp", model))
    assert isinstance(record, float)
    assert f"{record:.3f}" == f"{record.loss:.3f}"
    assert sum([record, record]) == 2 * record.loss
    assert max(record, 0.0) == torch.tensor(record, dtype=torch.float64).item() == record.loss
    assert json.loads(json.dumps(record)) == record.loss
    assert record == record.loss
    assert hash(record) == hash(record.loss)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda record: pickle.loads(pickle.dumps(record))])
def test_a_record_survives_copying_and_pickling_whole(duplicate: Callable[[StepRecord], StepRecord]) -> None:
    record = ZeroOrder(model := tiny("mlp"), num_probes=2).step(closure("mlp", model))
    twin = duplicate(record)
    assert type(twin) is StepRecord
    assert float(twin) == float(record)
    assert twin.as_dict() == record.as_dict()
    assert twin.probes == record.probes


def test_a_record_says_what_was_done() -> None:
    model = tiny("mlp")
    zo = ZeroOrder(model, lr=LR, eps=EPS, num_probes=3, seed=5)
    seen: list[float] = []
    loss = closure("mlp", model)

    def watched() -> Tensor:
        value = loss()
        seen.append(value.item())
        return value

    zo.step(loss)
    record = zo.step(watched)
    grads = [(plus - minus) / (2 * EPS) for plus, minus in zip(seen[::2], seen[1::2], strict=True)]
    assert record.loss == math.fsum(seen) / 6
    assert record.projected_grad == math.fsum(grads) / 3
    assert [probe.coefficient for probe in record.probes] == [float32(g / 3) for g in grads]
    assert len({probe.seed for probe in record.probes}) == 3
    assert (record.seed, record.step, record.lr) == (record.probes[0].seed, 1, LR)
    assert (record.clipped, record.skipped) == (0, None)


def test_listeners_hear_of_every_step() -> None:
    model = tiny("mlp")
    zo = ZeroOrder(model)
    heard: list[StepRecord] = []
    zo.listeners.append(heard.append)
    records = [*(zo.step(closure("mlp", model, i)) for i in range(2)), zo.step(lambda: float("nan"))]
    assert all(a is b for a, b in zip(heard, records, strict=True))


def test_the_coefficient_is_clipped_and_the_projected_gradient_told_as_measured() -> None:
    model = nn.Linear(3, 1, bias=False)
    x = torch.tensor([[100.0, 10.0, 1.0]])
    zo = ZeroOrder(model, lr=1.0, clip=5.0, num_probes=2)
    before = model.weight.detach().clone()
    record = zo.step(lambda: model(x).sum())
    assert record.clipped == 2
    assert [abs(probe.coefficient) for probe in record.probes] == [2.5, 2.5]  # the mean over two directions
    assert abs(record.projected_grad) > 5
    z = [NOISES.resolve("rademacher").z(probe.seed, "weight", 0, 3).view(1, 3) for probe in record.probes]
    moved = sum(-probe.coefficient * direction for probe, direction in zip(record.probes, z, strict=True))
    assert torch.equal(model.weight.detach(), before + moved)
    assert ZeroOrder(model, clip=1e6).step(lambda: model(x).sum()).clipped == 0


def test_the_mean_over_more_probes_is_the_mean_of_their_updates() -> None:
    model = nn.Linear(4, 1, bias=False).double()
    start = model.weight.detach().clone()
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).double()
    record = ZeroOrder(model, lr=1.0, num_probes=5).step(lambda: model(x).sum())
    z = torch.stack([NOISES.resolve("rademacher").z(probe.seed, "weight", 0, 4) for probe in record.probes])
    slopes = z.double() @ x[0]  # at most 10
    found = torch.tensor([5 * probe.coefficient for probe in record.probes], dtype=torch.float64)
    # What is not float64 here is eps, a float32 when it multiplies z: a relative error of 2**-24.
    assert (found - slopes).abs().max() <= 10 * 2.0**-23
    # The five terms of at most 2 and their four sums of at most 10 are float32, each with an error of 2**-24 relative.
    expected = start - (found.unsqueeze(1) * z).mean(0)
    assert (model.weight.detach() - expected).abs().max() <= (5 * 2 + 4 * 10) * 2.0**-24


def test_a_probe_and_a_record_are_plain_values() -> None:
    record = ZeroOrder(model := tiny("mlp"), lr=1e-3).step(closure("mlp", model))
    assert record.probes == (Probe(record.seed, record.projected_grad),)
    assert json.dumps(record.as_dict())


# Steps that are skipped


@pytest.mark.parametrize("rule", OWN_RULES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("probe", [0, 1])
def test_a_loss_that_is_not_finite_skips_the_step(
    rule: str, bad: float, probe: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny("mlp")
    zo = ZeroOrder(model, lr=LR, rule=rule)
    calls: list[int] = []

    def loss() -> Tensor:
        calls.append(1)
        # The first step begins with a probe that looks at the closure, and until a probe's loss was finite it is
        # tried a second time, with copies of all weights at once.
        return closure("mlp", model)() * (bad if len(calls) in ((1, 2, 3, 4), (3,))[probe] else 1.0)

    with left_as_found(model), caplog.at_level(logging.WARNING):
        record = zo.step(loss)
    assert record.skipped is not None
    assert "not finite" in record.skipped
    assert math.isnan(record)
    assert record.probes == ()
    assert any("step 0 skipped, weights untouched" in message for message in caplog.messages)
    assert not zo.optimizer.state
    following = zo.step(closure("mlp", model))
    assert following.skipped is None
    assert (following.step, zo.step_count) == (1, 2)
    assert following.seed != record.seed


@pytest.mark.parametrize("rule", OWN_RULES)
def test_a_projected_gradient_beyond_float32_skips_the_step(rule: str) -> None:
    model = nn.Linear(2, 1, bias=False)
    zo = ZeroOrder(model, lr=1e-3, eps=1e-3, rule=rule)
    with left_as_found(model):
        record = zo.step(lambda: model.weight.double().sum() * 1e40)
    assert record.skipped is not None
    assert "float32" in record.skipped
    assert zo.step_count == 1
    assert zo.step(lambda: model.weight.sum()).skipped is None


@pytest.mark.parametrize("rule", OWN_RULES)
@pytest.mark.parametrize("noise", list(NOISES))
def test_two_equal_losses_move_nothing_by_the_estimate(rule: str, noise: str) -> None:
    model = tiny("mlp")
    zo = ZeroOrder(model, lr=LR, rule=rule, noise=noise)
    with left_as_found(model):
        record = zo.step(lambda: 1.0)
    assert record.projected_grad == 0.0


# Configuration


def test_defaults_are_those_of_the_estimator() -> None:
    for name in ESTIMATORS:
        zo = ZeroOrder(tiny("mlp"), estimator=name)
        estimator = ESTIMATORS.resolve(name)
        group = zo.optimizer.param_groups[0]
        kind = None if zo.normaliser is None else zo.normaliser.name
        rate = default_lr(zo.slots, zo.rule, kind, estimator.default_num_probes)
        eps = max(estimator.default_eps, 1e-3) if kind == "curvature" else estimator.default_eps  # of fzoo
        assert (group["lr"], group["eps"]) == (rate, eps)
        assert ZeroOrder(tiny("mlp"), estimator=name, lr=1e-3).eps == estimator.default_eps
        assert zo.num_probes == estimator.default_num_probes


def test_overrides_go_before_the_config() -> None:
    config = ZOConfig(lr=1.0, eps=0.5, seed=3)
    zo = ZeroOrder(tiny("mlp"), config, eps=0.25)
    assert (zo.optimizer.param_groups[0]["lr"], zo.eps, zo.seed) == (1.0, 0.25, 3)
    assert config.eps == 0.5


@pytest.mark.parametrize(
    "config",
    [
        ZOConfig(),
        ZOConfig(lr=1e-4, eps=0.1, num_probes=3, weight_decay=0.1, clip=2.0, seed=7, dropout=True),
        ZOConfig(stochastic_rounding=False, backend="eager", noise="gaussian"),
        *(ZOConfig(estimator=name) for name in ESTIMATORS),
        *(ZOConfig(rule=name) for name in RULES),
        *(ZOConfig(noise=name) for name in NOISES),
        ZOConfig(rule={"name": "momentum", "beta": 0.5}),
        ZOConfig(rule=Momentum(0.25), estimator=Fzoo()),
    ],
    ids=lambda config: str({k: v for k, v in config.to_dict().items() if v != ZOConfig().to_dict()[k]}),
)
def test_a_configuration_goes_through_json_and_back(config: ZOConfig) -> None:
    twin = ZOConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert twin.to_dict() == config.to_dict()
    assert twin.resolve(has_optimizer=twin.rule == "torch") == config.resolve(has_optimizer=twin.rule == "torch")
    assert ZOConfig.from_dict({}) == ZOConfig()
