"""Law: "es" is its formula, whatever its population is spread over; with ``maximize`` all estimators climb."""

from __future__ import annotations

import logging
import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import closure, tiny
from processes import together
from reference import evolution
from torch import Tensor, nn

from zo_core import (
    ESTIMATORS,
    ConfigError,
    Es,
    Scores,
    SeedLog,
    SeedLogWriter,
    Spsa,
    StateError,
    Summary,
    ZeroOrder,
    ZOConfig,
    ZOOptimizer,
    derive_seed,
    replay,
)
from zo_core.noise.direction import float32
from zo_core.seedlog.__main__ import summary as shown

SHAPES = list(product(("center", "zscore", "ranks"), (False, True)))
EVERY_SHAPE = pytest.mark.parametrize(("shaping", "antithetic"), SHAPES)
SEEDS = tuple(derive_seed(0, 0, i) for i in range(4))


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.linspace(-1, 1, 12))


def es(shaping: str = "zscore", antithetic: bool = False) -> dict[str, object]:
    return {"name": "es", "shaping": shaping, "antithetic": antithetic}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


# The formula


@EVERY_SHAPE
@given(losses=st.lists(st.integers(-50, 50), min_size=4, max_size=12).filter(lambda found: len(set(found)) > 1))
def test_coefficients_are_those_of_the_definition(shaping: str, antithetic: bool, losses: list[int]) -> None:
    values = [loss / 8 for loss in losses[: len(losses) // 2 * 2]]
    if len(set(values)) == 1:
        return
    found = Es(shaping, antithetic).estimate(values, 0.25).coefficients
    assert found == pytest.approx(evolution(values, 0.25, shaping, antithetic), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("n", [1, 4])
def test_pairs_with_the_mean_as_baseline_are_spsa(n: int) -> None:
    assert Es(antithetic=True).points(SEEDS[:n], 0.5) == Spsa().points(SEEDS[:n], 0.5)
    losses = [math.sin(i) for i in range(2 * n)]
    assert Es("center", antithetic=True).estimate(losses, 1e-3) == Spsa().estimate(losses, 1e-3)


def test_equal_scores_share_their_rank_also_where_rounding_parts_them() -> None:
    # 0.1 + 0.2 is not 0.3, which a sum of the same scores in another order may be.
    found = Es("ranks").estimate([0.1 + 0.2, 0.3, 1.0, -1.0], 1.0).coefficients
    assert found == Es("ranks").estimate([0.3, 0.3, 1000.0, -5.0], 1.0).coefficients
    assert found[0] == found[1] == 0.0
    assert Es().estimate([0.1 + 0.2, 0.3], 1.0).skip is not None


@given(losses=st.lists(st.integers(-1000, 1000), min_size=4, max_size=8, unique=True), power=st.integers(-8, 8))
@pytest.mark.parametrize("shaping", ["zscore", "ranks"])
def test_eps_and_the_scale_of_the_loss_cancel(shaping: str, losses: list[int], power: int) -> None:
    plain = Es(shaping).estimate([float(loss) for loss in losses], 1e-2)
    scaled = Es(shaping).estimate([loss * 2.0**power for loss in losses], 1e-4)
    assert scaled.coefficients == plain.coefficients
    assert Es(shaping).scale_free
    assert not Es("center").scale_free


def test_centring_scores_by_prompt_first_changes_nothing() -> None:
    """All members answer the same prompts, so that the mean of a prompt is in the mean of every member."""
    scores = torch.randint(0, 9, (6, 5), generator=torch.Generator().manual_seed(0)).double() / 4
    centred = scores - scores.mean(0)
    for shaping, _ in SHAPES[::2]:
        plain = Es(shaping).estimate(scores.mean(1).tolist(), 0.5).coefficients
        assert Es(shaping).estimate(centred.mean(1).tolist(), 0.5).coefficients == pytest.approx(plain, rel=1e-12)


def test_wrong_fields_say_what_to_write() -> None:
    with pytest.raises(ConfigError, match=r"shaping='rank' .*write one of 'center', 'zscore', 'ranks'"):
        ZOConfig(estimator={"name": "es", "shaping": "rank"})
    with pytest.raises(ConfigError, match="num_probes=1 must be a whole number of at least 2 with estimator 'es'"):
        ZOConfig(estimator="es", num_probes=1)


# Scores


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_maximising_a_score_is_minimising_its_negative(estimator: str) -> None:
    up, down = Weights(), Weights()
    one = ZeroOrder(up, estimator=estimator, num_probes=3, lr=0.1, maximize=True)
    other = ZeroOrder(down, estimator=estimator, num_probes=3, lr=0.1)
    for _ in range(5):
        record, minus = one.step(lambda: 1 - up.x.square().sum()), other.step(lambda: down.x.square().sum() - 1)
        assert torch.equal(up.x, down.x)
        assert record.loss == minus.loss
        assert record.scores is not None


def test_the_record_has_the_scores_as_they_were_returned() -> None:
    scores = iter([0.5, 0.25, 0.5, 0.75])  # the first one a second time, which the first step checks
    record = ZeroOrder(Weights(), estimator="es", num_probes=3, maximize=True, lr=0.0).step(lambda: next(scores))
    assert record.scores == Scores(0.5, 0.25, 0.25, 0.75)
    assert record.loss == -0.5
    assert math.isnan(record.projected_grad)
    assert ZeroOrder(Weights(), lr=0.0).step(lambda: 0.5).scores is None


def test_a_log_line_has_the_scores_by_name() -> None:
    model, summary = Weights(), Summary()
    zo = ZeroOrder(model, estimator="es", num_probes=4, maximize=True, lr=1e-2)
    zo.listeners.append(summary.add)
    found = [zo.step(lambda: -model.x.square().sum()).scores for _ in range(2)]
    first, second = (scores for scores in found if scores is not None)
    line = summary.numbers()
    assert line["zo_score_mean"] == (first.mean + second.mean) / 2
    assert line["zo_score_std"] == math.sqrt((first.std**2 + second.std**2) / 2)
    assert line["zo_score_min"] == min(first.min, second.min)
    assert line["zo_score_max"] == max(first.max, second.max)
    assert "projected_grad" not in line
    assert "zo_score_mean" not in summary.numbers()


def test_a_population_without_differences_is_a_skipped_step_with_a_count(caplog: pytest.LogCaptureFixture) -> None:
    model, summary = Weights(), Summary()
    before = state(model)
    zo = ZeroOrder(model, estimator="es", num_probes=4, maximize=True)
    zo.listeners.append(summary.add)
    with caplog.at_level(logging.INFO, "zo_core"):
        records = [zo.step(lambda: float(model.x.sum() > 100)) for _ in range(3)]
    assert all(record.skipped is not None and "agree" in record.skipped for record in records)
    assert equal(state(model), before)
    assert summary.numbers()["zo_skipped_steps"] == 3
    assert zo.step_count == 3
    assert math.copysign(1.0, records[0].loss) == 1.0  # a score of 0 is not a loss of -0


def test_scores_that_are_not_finite_skip_the_step() -> None:
    model = Weights()
    before = state(model)
    zo = ZeroOrder(model, estimator="es", num_probes=2)
    calls = iter([0.0, 0.0, math.nan] * 2)
    record = zo.step(lambda: next(calls))
    assert record.skipped is not None
    assert record.scores is None
    assert equal(state(model), before)


@pytest.mark.parametrize("member", [0, 2, 5])
def test_a_closure_that_raises_in_a_member_leaves_everything_as_it_was(member: int) -> None:
    model = tiny("llama")
    zo = ZeroOrder(model, estimator=es(antithetic=True), num_probes=3, lr=1e-3)
    zo.step(closure("llama", model))
    before, step = state(model), zo.step_count
    calls = iter(range(100))

    def fails() -> Tensor:
        if next(calls) == member:
            raise RuntimeError("the judge does not answer")
        return closure("llama", model)()

    with pytest.raises(RuntimeError, match="the judge"):
        zo.step(fails)
    assert equal(state(model), before)
    assert zo.step_count == step
    twin = tiny("llama")
    other = ZeroOrder(twin, estimator=es(antithetic=True), num_probes=3, lr=1e-3)
    for each, model_of in ((zo, model), (other, twin), (other, twin)):
        each.step(closure("llama", model_of))
    assert equal(state(model), state(twin))


# With everything else


@EVERY_SHAPE
def test_replay_is_the_run_bit_for_bit(tmp_path: Path, shaping: str, antithetic: bool) -> None:
    model = tiny("llama")
    settings = {
        "estimator": es(shaping, antithetic),
        "num_probes": 3,
        "maximize": True,
        "normalise": shaping == "center",
    }
    zo = ZeroOrder(model, lr=1e-3, **settings)  # type: ignore[arg-type]
    log = SeedLogWriter.attach(zo, tmp_path / "log.zo")
    score = closure("llama", model)
    records = [zo.step(lambda: -score()) for _ in range(3)]
    records.append(zo.step(lambda: 1.0))
    log.close()
    fresh = tiny("llama")
    assert replay(fresh, tmp_path / "log.zo") == 4
    assert equal(state(fresh), state(model))
    steps = SeedLog.read(tmp_path / "log.zo").steps
    assert [entry.scores for entry in steps] == [record.scores for record in records]
    assert any(line.startswith("scores ") for line in shown(SeedLog.read(tmp_path / "log.zo")))
    assert [entry.loss for entry in steps] == [float32(record.loss) for record in records]
    again = tiny("llama")
    engine = ZeroOrder(again, lr=1e-3, **settings)  # type: ignore[arg-type]
    for entry in steps:
        engine.repeat(entry.probes, entry.loss, entry.normaliser, entry.rollback, entry.scores)
        assert engine.optimizer.step().scores == entry.scores
    assert equal(state(again), state(model))


def test_a_log_of_scores_is_not_continued_as_one_of_losses(tmp_path: Path) -> None:
    model = Weights()
    zo = ZeroOrder(model, lr=1e-3, maximize=True)
    SeedLogWriter.attach(zo, tmp_path / "log.zo").close()
    with pytest.raises(StateError, match=r"maximize=True.* and this one has maximize=False"):
        SeedLogWriter.attach(ZeroOrder(Weights(), lr=1e-3), tmp_path / "log.zo", follow=True)


@pytest.mark.parametrize(
    "settings", [{"noise": "low_rank"}, {"noise": "low_rank", "stack_probes": True}, {"offload": "cpu"}]
)
def test_streamed_stacked_and_functional_members_score_alike(settings: dict[str, object]) -> None:
    rank = {"noise": "low_rank"} if "noise" in settings else {}
    found = []
    for how in (rank, settings):
        model = tiny("llama")
        zo = ZeroOrder(model, estimator="es", num_probes=3, maximize=True, lr=1e-3, **how)  # type: ignore[arg-type]
        score = closure("llama", model)
        records = [zo.step(lambda score=score: -score()) for _ in range(2)]  # type: ignore[misc]
        zo.close()
        found.append(([record.scores for record in records], state(model)))
    if "stack_probes" in settings:  # in one forward, whose sums have another order
        assert [s.mean for s in found[0][0] if s] == pytest.approx([s.mean for s in found[1][0] if s], rel=1e-5)
    else:
        assert found[0][0] == found[1][0]
        assert equal(found[0][1], found[1][1])


def test_micro_batches_are_one_population() -> None:
    found = []
    for parts in (1, 2):
        model = Weights()
        zo = ZeroOrder(model, estimator=es("ranks"), num_probes=4, lr=1e-2)
        for _ in range(parts):
            zo.measure(lambda model=model, parts=parts: model.x.square().sum() / parts)  # type: ignore[misc]
        zo.optimizer.step()
        found.append(state(model))
    assert equal(*found)


# Several processes


def score_of(model: Weights, rank: int, step: int) -> Tensor:
    return (model.x - 0.1 * step - rank).square().sum()


def run(rank: int, **settings: object) -> dict[str, Tensor]:
    model = Weights()
    zo = ZeroOrder(model, lr=1e-2, num_probes=4, **settings)  # type: ignore[arg-type]
    for step in range(3):
        zo.step(lambda step=step: score_of(model, rank, step))  # type: ignore[misc]
    return state(model)


def test_two_processes_with_the_points_of_one_are_one(tmp_path: Path) -> None:
    found = together(lambda rank: [run(0, ranks="points", estimator=es(*shape)) for shape in SHAPES], tmp_path)
    for index, shape in enumerate(SHAPES):
        alone = run(0, estimator=es(*shape))
        assert all(equal(each[index], alone) for each in found)


def test_each_process_has_a_population_on_its_own_data(tmp_path: Path) -> None:
    """The update is the mean of those of two populations, whose losses on different batches are not compared."""
    found = together(lambda rank: run(rank, estimator="es"), tmp_path)
    model = Weights()
    for step in range(3):
        x, total = model.x.detach().clone(), torch.zeros(12)
        directions = [ZeroOrder(model).noise.z(derive_seed(0, step, i), "x", 0, 12) for i in range(8)]  # type: ignore[attr-defined]
        for rank in range(2):
            mine, losses = directions[4 * rank : 4 * rank + 4], []
            for z in mine:
                model.x.data = x + float32(1e-3) * z
                losses.append(score_of(model, rank, step).item())
            for z, c in zip(mine, Es().estimate(losses, 1e-3).coefficients, strict=True):
                total += float32(-1e-2 * float32(c / 8)) * z
        model.x.data = x + total
    assert all(equal(each, state(model)) for each in found)


def test_steps_along_scores_that_were_compared_are_a_part_of_eps() -> None:
    """Eps is then how far weights move before a score changes; a loss is measured as near as rounding allows."""
    settings: dict[str, Any] = {"estimator": "es", "eps": 0.5, "num_probes": 16, "maximize": True}
    assert ZeroOrder(Weights(), **settings | {"eps": 5.0}).lr == pytest.approx(5.0 * 16 / 60)
    assert ZeroOrder(Weights(), **settings | {"eps": 5.0, "num_probes": 90}).lr == pytest.approx(5.0 / 2)
    model = Weights()
    own = ZOOptimizer(model.parameters(), eps=5.0)
    assert ZeroOrder(model, optimizer=own, **settings | {"eps": None}).lr == pytest.approx(5.0 * 16 / 60)
    length = 0.06 * 16 / 12**0.5
    assert ZeroOrder(Weights(), **settings).lr == pytest.approx(length)  # is more than 0.5 * 16 / 60
    for other in (
        {"maximize": False},
        {"normalise": "gradient"},
        {"rule": "sign"},
        {"estimator": "fzoo", "normalise": False},
    ):
        assert ZeroOrder(Weights(), **settings | {"eps": 5.0} | other).lr == pytest.approx(length)
