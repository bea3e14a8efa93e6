"""Law: the brake notices when the loss has risen, soon, and hardly ever when it has not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import pytest

from zo_core.brake.statistic import BURST, CHUNK, Alarm, Block, Brake, in_float32, normal_deviate

Losses = Callable[[np.random.Generator, int], np.ndarray]

#: Losses of runs in which nothing rises.
STEADY: dict[str, Losses] = {
    "normal": lambda g, n: 1 + 0.3 * g.standard_normal(n),
    "around zero": lambda g, n: g.standard_normal(n),
    "exponential": lambda g, n: g.exponential(1.0, n),
    "lognormal": lambda g, n: np.exp(g.standard_normal(n)),
    "heavy": lambda g, n: np.exp(1.5 * g.standard_normal(n)),
    "rare spikes": lambda g, n: 5.0 * (g.random(n) < 0.05) + 0.01 * g.random(n),
    "decreasing": lambda g, n: 2 * np.exp(-np.arange(n) / 1000) + 0.2 * g.standard_normal(n),
    "decreasing, exponential": lambda g, n: (2 * np.exp(-np.arange(n) / 1000) + 0.1) * g.exponential(1.0, n),
    "without noise": lambda g, n: 2.0 + 0.019 * np.sin(np.arange(n)) * (np.arange(n) > 0),
}


def first_alarm(brake: Brake, losses: Iterable[float], step: int = 0) -> tuple[int, Alarm] | None:
    for index, loss in enumerate(losses, step):
        alarm = brake.see(index, in_float32(float(loss)))
        if alarm is not None:
            return index, alarm
    return None


def false_alarms(losses: Losses, runs: int, steps: int) -> int:
    seen = (first_alarm(Brake(), losses(np.random.default_rng(seed), steps)) for seed in range(runs))
    return sum(one is not None for one in seen)


@pytest.mark.parametrize("kind", STEADY)
def test_losses_that_do_not_rise_raise_no_alarm(kind: str) -> None:
    assert false_alarms(STEADY[kind], runs=20, steps=1000) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", STEADY)
def test_the_rate_of_false_alarms_is_the_one_that_is_stated(kind: str) -> None:
    assert false_alarms(STEADY[kind], runs=300, steps=3000) <= 3


@pytest.mark.parametrize(("rise", "within"), [(0.5, 1100), (1.0, 200), (2.0, 64), (4.0, 32), (20.0, BURST)])
@pytest.mark.parametrize("kind", ["normal", "exponential"])
def test_a_rise_is_found_within_a_known_number_of_steps(kind: str, rise: float, within: int) -> None:
    before, spread = 2000, 0.3 if kind == "normal" else 1.0
    for seed in range(5):
        losses = STEADY[kind](np.random.default_rng(seed), before + within)
        losses[before:] += rise * spread
        found = first_alarm(Brake(), losses)
        assert found is not None
        step, alarm = found
        assert before <= step < before + within
        assert 0 <= alarm.step < before
        assert abs(alarm.best - 1.0) < spread
        assert alarm.loss > alarm.best


def test_a_slow_rise_is_found_and_the_best_step_is_where_it_was() -> None:
    steps = np.arange(6000)
    noise = 0.1 * np.random.default_rng(0).standard_normal(len(steps))
    found = first_alarm(Brake(), 1.0 + np.abs(steps - 2000) / 2000 + noise)
    assert found is not None
    assert found[0] < 2600
    assert 1600 < found[1].step < 2400
    assert found[1].best < 1.2


@pytest.mark.parametrize("good", [1, 2, 4, 8])
def test_a_run_whose_first_updates_do_harm_goes_back_to_where_it_began(good: int) -> None:
    generator = np.random.default_rng(0)
    losses = [*(0.69 + 0.02 * generator.standard_normal(good)), *(30 * np.exp(0.3 * generator.standard_normal(300)))]
    found = first_alarm(Brake(), losses)
    assert found is not None
    assert found[0] < (256 if good == 1 else 64)
    assert found[1].step <= good
    later = replace(found[1], step=found[1].step + 7)
    assert first_alarm(Brake(7), losses, 7) == (found[0] + 7, later)


def test_three_losses_that_are_not_finite_raise_an_alarm_at_once_and_others_do_not() -> None:
    nan, inf = math.nan, math.inf
    found = first_alarm(Brake(), [1.0, nan, inf, 1.0, nan, nan, nan])
    assert found is not None
    assert (found[0], found[1].step) == (6, 0)
    assert "not finite" in found[1].reason
    assert first_alarm(Brake(), [nan] * 100) is None  # it never was any better


def test_one_outlier_is_no_alarm() -> None:
    for size in (1e1, 1e3, 1e6, 3e38):
        losses = STEADY["normal"](np.random.default_rng(0), 600)
        losses[300] = losses[301] = size
        assert first_alarm(Brake(), losses) is None


def test_without_noise_a_rise_has_to_exceed_one_percent() -> None:
    assert first_alarm(Brake(), [1.0] * 100 + [1.009] * 1000) is None
    found = first_alarm(Brake(), [1.0] * 96 + [1.011] * 1000)
    assert found is not None
    assert found[0] == 96 + CHUNK - 1


def test_after_an_alarm_the_best_block_stays_and_the_rest_begins_again() -> None:
    brake = Brake()
    assert first_alarm(brake, [1.0] * 96 + [5.0] * 2) is None
    found = first_alarm(brake, [5.0], 98)
    assert found is not None
    assert brake.first == 99
    assert first_alarm(brake, [1.0] * 200, 99) is None
    assert first_alarm(brake, [5.0] * BURST, 299) == (301, found[1])


def test_memory_is_bounded() -> None:
    brake = Brake()
    for step in range(5000):
        brake.see(step, float(step % 7))
    assert len(json.dumps(brake.saved())) < 10_000


def test_a_brake_that_was_saved_goes_on_as_if_it_had_not_been() -> None:
    losses = [in_float32(float(loss)) for loss in STEADY["exponential"](np.random.default_rng(1), 400)]
    losses += [loss + 2.0 for loss in losses[:200]]
    whole, found = Brake(), []
    expected = [whole.see(step, loss) for step, loss in enumerate(losses)]
    for at in (1, 17, 100, 390, 405):
        before, after = Brake(), Brake(12345)
        found = [before.see(step, loss) for step, loss in enumerate(losses[:at])]
        after.load(before.saved())
        found += [after.see(step, loss) for step, loss in enumerate(losses[at:], at)]
        assert found == expected
        assert after.saved() == whole.saved()
    assert any(expected)


def test_blocks_add_up() -> None:
    values = np.random.default_rng(0).exponential(1.0, 48)
    blocks = [Block.of(list(values[i : i + 16]), i, i + 15) for i in (0, 16, 32)]
    whole = blocks[0] + blocks[1] + blocks[2]
    assert (whole.count, whole.first, whole.last) == (48, 0, 47)
    assert math.isclose(whole.mean, values.mean())
    assert math.isclose(whole.variance, values.var(ddof=1))


@pytest.mark.parametrize(
    ("t", "freedom", "z"), [(1.0, 10, 0.9524), (4.0, 10, 3.0211), (4.0, 30, 3.5523), (9.0, 30, 6.2186)]
)
def test_normal_deviates_of_t(t: float, freedom: float, z: float) -> None:
    assert abs(normal_deviate(t, freedom) - z) < 0.03
    assert normal_deviate(-t, freedom) == -normal_deviate(t, freedom)
