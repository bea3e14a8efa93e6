"""Law: weight decay to the start pulls each weight to what it was before its first update, wherever it is stored."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import closure, tiny
from test_rollback import assert_replays, largest_difference, rollbacks, train
from test_rules import LR, directions, f32, random_weights, values
from torch import Tensor
from traces import same_bits, weights

from zo_core import RULES, ConfigError, Momentum, SeedLogWriter, Sgd, UpdateRule, ZeroOrder, replay
from zo_core.noise import Direction

DECAYING = [name for name in RULES if "decay_to" in RULES.resolve(name).__dataclass_fields__]
EVERY_RULE = pytest.mark.parametrize("rule", [{"name": name, "decay_to": "start"} for name in DECAYING], ids=DECAYING)
PLACES = pytest.mark.parametrize("place", [None, "cpu", "disk"])
DECAY = 20.0


def naive(rule: str, theta: Tensor, start: Tensor, m: Tensor, g: Direction) -> tuple[Tensor, Tensor]:
    """The formula of a step, for whole tensors: the update, then the pull to the start."""
    if rule == "sgd":
        theta = theta + values(g, theta.shape, -LR)
    elif rule == "sign":
        theta = theta + values(g, theta.shape).sign() * f32(-LR)
    else:
        m = m * f32(0.9) + values(g, theta.shape)
        theta = theta + m * f32(-LR)
    return theta + (start - theta) * f32(LR * 0.1), m


@EVERY_RULE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_step_is_its_formula(rule: dict[str, Any], dtype: torch.dtype) -> None:
    theta = random_weights(dtype)
    start, state = theta.clone(), {}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    m = torch.zeros(theta.shape, dtype=wide)
    for direction in directions("rademacher"):
        expected, m = naive(rule["name"], theta.to(wide), start.to(wide), m, direction)
        RULES.resolve(rule).update(theta, state, direction, LR, 0.1)
        assert torch.equal(theta, expected.to(dtype))
    assert torch.equal(state["anchor"], start)
    assert state["anchor"].dtype == dtype


def run(steps: range, zo: ZeroOrder, log: SeedLogWriter | None = None) -> None:
    for step in steps:
        zo.step(closure("llama", zo.model, step % 3))
    if log is not None:
        log.close()


def engine(rule: dict[str, Any], place: str | None = None, **settings: Any) -> ZeroOrder:
    return ZeroOrder(tiny("llama"), lr=1e-3, rule=rule, weight_decay=DECAY, offload=place, **settings)


CASES = [
    ("momentum", "rademacher", "disk"),
    ("momentum", "sparse", None),
    ("sgd", {"name": "low_rank", "refresh": 3}, "cpu"),
    ("sgd", "sampled", "cpu"),
    ("sign", "sparse", "disk"),
]


@pytest.mark.parametrize(("rule", "noise", "place"), CASES)
def test_a_streamed_run_and_a_replayed_one_have_the_same_bits(
    noise: Any, rule: Any, place: str | None, tmp_path: Path
) -> None:
    rule = {"name": rule, "decay_to": "start"}
    resident = engine(rule, noise=noise)
    run(range(5), resident)
    zo = engine(rule, place, noise=noise)
    run(range(5), zo, SeedLogWriter.attach(zo, tmp_path / "log"))
    assert zo.distance() == pytest.approx(resident.distance(), rel=1e-12)
    zo.close()
    assert same_bits(weights(zo.model), weights(resident.model))
    again = engine(rule, place, noise=noise)
    replay(again, tmp_path / "log", 2)
    replay(again, tmp_path / "log")
    again.close()
    assert same_bits(weights(again.model), weights(resident.model))
    plain = ZeroOrder(tiny("llama"), lr=1e-3, rule=rule["name"], weight_decay=DECAY, noise=noise)
    run(range(5), plain)
    assert not same_bits(weights(plain.model), weights(resident.model))


@PLACES
def test_a_checkpoint_has_the_start_also_of_what_has_not_moved_yet(place: str | None) -> None:
    settings: dict[str, Any] = {"noise": {"name": "sampled", "share": 0.5}}
    rule = {"name": "momentum", "decay_to": "start"}
    whole = engine(rule, **settings)
    run(range(6), whole)
    first = engine(rule, place, **settings)
    run(range(1), first)
    saved = copy.deepcopy((first.state_dict(), first.model.state_dict()))
    moved = {index for index, kept in saved[0]["optimizer"]["state"].items() if "anchor" in kept}
    assert 0 < len(moved) < len(first.slots)
    first.close()
    second = engine(rule, place, **settings)
    second.model.load_state_dict(saved[1])
    second.load_state_dict(saved[0])
    run(range(1, 6), second)
    second.close()
    assert same_bits(weights(second.model), weights(whole.model))


@PLACES
def test_what_is_undone_leaves_no_anchor(place: str | None) -> None:
    zo = engine({"name": "sgd", "decay_to": "start"}, place)
    kept = zo.snapshot()
    run(range(2), zo)
    kept.restore()
    with torch.no_grad():
        zo.model.load_state_dict({name: value + 0.01 for name, value in tiny("llama").state_dict().items()})
    assert zo.distance() == 0.0
    run(range(2), zo)
    other = engine({"name": "sgd", "decay_to": "start"})
    other.model.load_state_dict({name: value + 0.01 for name, value in tiny("llama").state_dict().items()})
    run(range(2), other)
    zo.close()
    assert same_bits(weights(zo.model), weights(other.model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@EVERY_RULE
def test_going_back_is_exact_up_to_rounding_and_replays(
    rule: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    own = rule | ({"beta": 0.0} if rule["name"] == "momentum" else {})
    settings = {"rule": own, "weight_decay": 1.0, "lr": 1e-2}
    _, records, seen = train(tmp_path / "log", tiny("mlp", dtype=dtype), "mlp", **settings, steps=range(48))
    to = rollbacks(records)[26].to
    assert 0 < to < 16
    moved, left = largest_difference(seen[26], seen[to]), largest_difference(seen[27], seen[to])
    largest = max(float(value.abs().max()) for value in seen[to].values())
    assert left <= 4 * torch.finfo(dtype).eps * largest + torch.finfo(torch.float32).eps * moved
    assert_replays(tmp_path / "log", lambda: tiny("mlp", dtype=dtype), seen)


def test_without_the_updates_nothing_moves() -> None:
    theta, state = torch.randn(1000), {}
    start, rule = theta.clone(), Sgd(decay_to="start")
    for direction in directions("rademacher"):
        rule.update(theta, state, direction.scaled(1e-30), 1e-4, 1e-4)
    assert torch.equal(theta, start)


def test_the_distance_is_that_from_the_weights_of_the_start() -> None:
    zo, before = engine({"name": "sgd", "decay_to": "start"}), weights(tiny("llama"))
    assert zo.distance() == 0.0
    run(range(3), zo)
    pairs = [(value, before[name]) for name, value in zo.model.named_parameters()]
    squares = [(value.detach().double() - start.double()).square().sum() for value, start in pairs]
    assert zo.distance() == pytest.approx(float(sum(squares)) ** 0.5, rel=1e-12)
    with pytest.raises(Exception, match="decay_to"):
        ZeroOrder(tiny("mlp")).distance()


def test_a_rule_without_it_is_described_as_before() -> None:
    assert RULES.describe(Momentum(0.5)) == {"name": "momentum", "beta": 0.5}
    anchored: UpdateRule = Momentum(0.5, decay_to="start")
    assert RULES.resolve(RULES.describe(anchored)) == anchored
    with pytest.raises(ConfigError, match="decay_to='end' is not known"):
        ZeroOrder(tiny("mlp"), rule={"name": "sgd", "decay_to": "end"})


@pytest.mark.parametrize("rule", ["momentum", {"name": "sgd", "decay_to": "start"}], ids=["momentum", "anchor"])
def test_weights_that_begin_to_move_in_mid_run_have_state_of_their_own(rule: Any) -> None:
    """Streamed ones, too: what stands for their state while it is stored is none of their values."""
    found = []
    for place in (None, "cpu"):
        model = tiny("llama")
        late = [p for name, p in model.named_parameters() if "layers.1.mlp.up" in name]
        for parameter in late:
            parameter.requires_grad_(False)
        zo = ZeroOrder(model, lr=1e-3, rule=rule, offload=place)
        for step in range(4):
            for parameter in late:
                parameter.requires_grad_(step == 3)
            zo.step(closure("llama", model, step))
        zo.close()
        found.append(weights(model))
    assert same_bits(*found)
    assert all(bool(value.isfinite().all()) for value in found[0].values())


def test_it_is_fixed_in_a_live_engine() -> None:
    zo = ZeroOrder(tiny("mlp"), rule="momentum", lr=1e-3)
    with pytest.raises(AttributeError, match="make another engine"):
        zo.rule = Momentum(0.9, decay_to="start")
