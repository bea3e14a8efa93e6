"""Law: the brake keeps the updates that it may have to revert, and no more."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from zo_core import RULES
from zo_core.brake import SHRUNK_16
from zo_core.brake.state import KEPT, KEPT_BYTES, Done, History
from zo_core.records import Probe
from zo_core.rules import Sgd

# The updates that are kept


def done(step: int, rule: Any = Sgd()) -> Done:  # noqa: B008
    return Done(
        step,
        (Probe(step, 0.5), Probe(step + 1, -0.25)),
        (0.1, 0.2),
        (1.0, 2.0),
        (0.0, 1e-5),
        rule,
        (0.1 * step, step) if step % 2 else None,
    )


def test_the_history_gives_back_what_was_done_and_is_bounded() -> None:
    history = History()
    for step in range(KEPT + 10):
        history.add(done(step), seed=7)
    assert (len(history.packed), history.floor) == (KEPT, 10)
    other = History()
    other.load(history.saved())
    assert other.saved() == history.saved()
    wide = Done(0, tuple(Probe(i, 0.5) for i in range(KEPT_BYTES // 8)), (0.1,), (1.0,), (0.0,), RULES.resolve("sgd"))
    for step in range(5):
        history.add(replace(wide, step=step), seed=7)
    assert (len(history.packed), history.floor) == (1, 4)
    history.load(other.saved())
    assert other.pop(KEPT + 7, lambda seed, step, i: step + i) == [done(step) for step in range(KEPT + 7, KEPT + 10)]
    history.drop_before(KEPT)
    assert (len(history.packed), history.floor) == (10, KEPT)


def test_the_history_of_a_momentum_that_cycles_keeps_only_what_is_needed() -> None:
    history = History()
    for step in range(100):
        history.add(done(step, RULES.resolve({"name": "momentum", "beta": step / 1000})), seed=step)
    history.drop_before(90)
    assert len(history.frames) == 10
    (last,) = history.pop(99, lambda seed, step, i: seed + i)
    assert last.rule.beta == 0.099
    assert [probe.seed for probe in last.probes] == [99, 100]


def shrinking(step: int, weight_decay: float) -> Done:
    return Done(step, (Probe(step, 0.5),), (0.01, 0.1), (1.0, 1.0), (0.0, weight_decay), Sgd())


def test_updates_are_kept_while_weight_decay_has_left_enough() -> None:
    """Half of the weights are left after every 69 steps here; going back divides by what is left."""
    history, share = History(), 1 - 0.1 * 0.1
    for step in range(2000):
        history.add(shrinking(step, 0.1), seed=7)
        assert share ** len(history.packed) > 1 / 256 * (1 - 1e-9)
    assert len(history.packed) == math.floor(math.log(256) / -math.log(share)) == 551
    assert history.floor == 2000 - 551
    history.add(shrinking(2000, 0.1), 7, SHRUNK_16)
    assert (len(history.packed), history.floor) == (68, 2001 - 68)
    other = History()
    other.load(history.saved())
    history.drop_before(1960)
    other.pop(1990, lambda seed, step, i: step)
    assert (len(history.packed), len(other.packed)) == (41, 57)
    for each in (history, other):
        assert each.shrunk == pytest.approx(-len(each.packed) * math.log(share), rel=1e-12)
    history.add(shrinking(2001, 10.0), seed=7)
    assert (len(history.packed), history.floor, history.shrunk) == (0, 2002, 0.0), "nothing is left of the weights"
