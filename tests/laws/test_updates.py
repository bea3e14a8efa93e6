"""Law: where a slot lives and how it is written may change in mid-run, and no update is lost or made twice."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import closure, tiny

from zo_core import RULES, Momentum, Point, SeedLogWriter, StateError, StepRecord, ZeroOrder, replay
from zo_core.exchange import Alone, Rows, combined
from zo_core.stand_ins import same_bits

LOW_RANK = {"name": "low_rank", "refresh": 50}
PLACES = [None, "cpu", "disk"]


def engine(place: str | None = None, **settings: Any) -> ZeroOrder:
    model = tiny("llama")
    return ZeroOrder(model, **{"lr": 1e-2, "seed": 3, "num_probes": 2, "offload": place, **settings})


def run(zo: ZeroOrder, steps: int) -> list[StepRecord]:
    return [zo.step(closure("llama", zo.model, zo.step_count)) for _ in range(steps)]


def weights(zo: ZeroOrder) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in zo.model.state_dict().items()}


def equal(one: ZeroOrder, other: ZeroOrder) -> bool:
    mine, theirs = weights(one), weights(other)
    return mine.keys() == theirs.keys() and all(same_bits(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("noise", ["rademacher", LOW_RANK])
def test_the_numbers_of_a_rule_may_change_in_mid_run(noise: Any, place: str | None) -> None:
    resident, other = (engine(where, noise=noise, rule=Momentum(0.3)) for where in (None, place))
    for zo in (resident, other):
        run(zo, 3)
        zo.flush()
        zo.rule = Momentum(0.8)
        run(zo, 4)
    assert equal(resident, other)
    without = engine(noise=noise, rule=Momentum(0.3))
    run(without, 7)
    assert not equal(without, resident)
    without.close(), other.close()


@pytest.mark.parametrize("rule", [rule for rule in RULES if RULES.resolve(rule).linear])
def test_a_rule_that_says_it_is_linear_is(rule: str) -> None:
    """Moving a factor by the rule and then making the product is moving the product, up to rounding."""
    full, windowed = engine(noise={**LOW_RANK, "rank": 1}, rule=rule), engine(noise={**LOW_RANK, "rank": 1}, rule=rule)
    full.copy_whole()  # which has no windows
    assert not full.updaters.windows.of
    assert windowed.updaters.windows.of
    for record in run(windowed, 6):
        full.repeat(record.probes, record.loss)
        full.optimizer.step()
    windowed.updaters.settle()
    for name, value in weights(full).items():
        # Six updates of float32 weights below 2, each of them rounded once more than the sum of all is.
        assert (value - weights(windowed)[name]).abs().max() <= 12 * 2**-23 * value.abs().max().clamp(min=1)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("noise", ["rademacher", LOW_RANK])
def test_a_step_that_is_skipped_moves_nothing_and_the_next_has_other_directions(noise: Any, place: str | None) -> None:
    skips, jumps = engine(place, noise=noise), engine(noise=noise)
    seen: list[StepRecord] = []
    skips.listeners.append(seen.append)
    for zo in (skips, jumps):
        run(zo, 2)
    before = weights(skips)
    skips.measure(closure("llama", skips.model, 2))
    record = skips.skip("of no use")
    assert (record.step, record.skipped, record.probes) == (2, "of no use", ())
    assert seen[-1] is record
    assert all(same_bits(before[name], value) for name, value in weights(skips).items())
    jumps.at(3)
    assert run(skips, 2)[-1].seed == run(jumps, 2)[-1].seed
    assert equal(skips, jumps)
    skips.close()


@pytest.mark.parametrize("step", [-1, 1.0, "3", None, True])
def test_what_is_no_step_is_an_error_that_leaves_the_engine_as_it_was(step: Any) -> None:
    zo = engine()
    zo.measure(closure("llama", zo.model))
    with pytest.raises(StateError, match=r"step=.* must be a whole number"):
        zo.at(step)
    assert zo.step_count == 0
    zo.optimizer.step()


@pytest.mark.parametrize("noise", ["rademacher", "sparse", LOW_RANK])
@pytest.mark.parametrize("rule", ["sgd", "momentum"])
def test_a_snapshot_takes_back_whatever_steps_have_done(noise: Any, rule: str) -> None:
    zo, straight = engine(noise=noise, rule=rule), engine(noise=noise, rule=rule)
    run(zo, 3), run(straight, 3)
    kept, state = weights(zo), copy.deepcopy(zo.state_dict())["optimizer"]["state"]
    before = zo.snapshot()
    zo.at(40)
    run(zo, 3)
    zo.lr = 7.0
    before.restore()
    assert all(same_bits(kept[name], value) for name, value in weights(zo).items())
    for index, found in zo.state_dict()["optimizer"]["state"].items():
        assert found.keys() == state[index].keys()
        assert all(same_bits(value, state[index][name]) for name, value in found.items())
    run(zo, 3), run(straight, 3)
    assert equal(zo, straight)


@pytest.mark.parametrize("rule", ["sgd", "momentum"])
def test_a_log_says_that_its_run_had_no_windows(tmp_path: Path, rule: str) -> None:
    """As for compiled models, whose forwards nothing could correct."""
    zo = engine(noise=LOW_RANK, rule=rule)
    zo.copy_whole()
    log = SeedLogWriter.attach(zo, tmp_path / "log")
    run(zo, 4)
    log.close()
    base = tiny("llama")
    assert replay(base, tmp_path / "log") == 4
    assert all(same_bits(value, weights(zo)[name]) for name, value in base.state_dict().items())


class Halves(Alone):
    """An exchange of two processes in which this one has the even points; the other's losses are known."""

    def __init__(self, other: ZeroOrder):
        self.other = other

    def dealt(self, points: Sequence[Point], seeds: Sequence[int]) -> list[tuple[int, ...]]:
        return [tuple(range(start, len(points), 2)) for start in range(2)]

    def gather(self, points: Sequence[Point], seeds: Sequence[int], step: int, losses: Sequence[float]) -> Rows:
        theirs = self.other.oracle.losses(list(points[1::2]), closure("llama", self.other.model, 0))
        other = dict(zip(range(1, len(points), 2), [float(loss) for loss in theirs], strict=True))
        return [dict(zip(range(0, len(points), 2), losses, strict=True)), other]

    def combine(self, points: Sequence[Point], rows: Rows) -> list[float]:
        return combined("points", points, rows)


def test_a_step_whose_points_are_shared_is_the_step_of_one_process() -> None:
    alone, half, other = engine(), engine(), engine()
    half.exchange = Halves(other)
    records = [zo.step(closure("llama", zo.model, 0)) for zo in (alone, half)]
    assert records[0].probes == records[1].probes
    assert equal(alone, half)
