"""Law: a normalised step depends on the shape of the loss, not on its scale, and every run of it can be repeated."""

from __future__ import annotations

import io
import itertools
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from models import closure, tiny
from traces import same_bits, weights

from zo_core import (
    ConfigError,
    Point,
    Probe,
    SeedLog,
    SeedLogWriter,
    StateError,
    StepRecord,
    ZeroOrder,
    ZOOptimizer,
    replay,
)
from zo_core.defaults import NEWTON, default_lr
from zo_core.normaliser import CURVATURE, Curvature
from zo_core.seedlog.format import NORMALISED, VERSION

LR, STEPS, BETA = 1e-2, 7, 0.99
KINDS = ["gradient", "curvature"]
VARIANTS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "momentum": {"rule": "momentum"},
    "sign": {"rule": "sign"},
    "four directions": {"num_probes": 4},
    "one side": {"estimator": {"name": "es", "shaping": "center"}, "num_probes": 3},
    "fzoo": {"estimator": "fzoo", "num_probes": 3},
    "low rank": {"noise": {"name": "low_rank", "rank": 2, "refresh": 3}},
    "sampled": {"noise": {"name": "sampled", "share": 0.5}},
    "clipped": {"clip": 1e-3},
}


CASES = [
    pytest.param({**settings, "normalise": kind}, id=f"{kind}, {name}")
    for kind in KINDS
    for name, settings in VARIANTS.items()
]


def engine(**settings: Any) -> ZeroOrder:
    return ZeroOrder(tiny("mlp"), **{"lr": LR, "normalise": True, **settings})


def run(zo: ZeroOrder, steps: int = STEPS) -> list[StepRecord]:
    return [zo.step(closure("mlp", zo.model, index)) for index in range(zo.step_count, steps)]


def test_the_formula_of_the_gradient() -> None:
    """``v <- beta v + (1 - beta) mean(g^2)``, corrected for its start; coefficients are ``g / (n sqrt(v))``."""
    plain, zo = engine(normalise=False, lr=0.0, num_probes=2), engine(lr=0.0, num_probes=2)
    total = 0.0
    for count, (raw, normalised) in enumerate(zip(run(plain), run(zo), strict=True), 1):
        found = [2 * probe.coefficient for probe in raw.probes]
        total = BETA * total + (1 - BETA) * (found[0] ** 2 + found[1] ** 2) / 2
        scale = math.sqrt(total / (1 - BETA**count))
        for probe, before in zip(normalised.probes, raw.probes, strict=True):
            # The same formula in another order of operations: a few roundings of float64, then one of float32.
            assert probe.coefficient == pytest.approx(before.coefficient / scale, rel=2**-23)
        assert normalised.projected_grad == raw.projected_grad
    assert [probe.coefficient for probe in run(engine(lr=0.0), 1)[0].probes] in ([1.0], [-1.0])


def test_the_formula_of_the_curvature() -> None:
    """``g / c`` with the root mean square of second differences, of which later ones have a larger part at first."""
    plain, zo = engine(normalise=False, lr=0.0, eps=1e-2), engine(normalise=CURVATURE, lr=0.0, eps=1e-2)
    assert isinstance(zo.normaliser, Curvature)
    size = sum(parameter.numel() for parameter in zo.model.parameters())
    zo.model.eval()  # as in probes
    mean = 0.0
    for index in range(60):
        loss = closure("mlp", zo.model, index)
        centre = float(loss().detach().double())
        points: list[float] = []

        def probe(kept: list[float] = points, index: int = index) -> torch.Tensor:
            found = closure("mlp", plain.model, index)().detach().double()
            kept.append(float(found))
            return found

        raw = plain.step(probe)
        plus, minus = points[-2:]
        record = zo.step(lambda loss=loss: loss().double())
        if not index:
            mean = (2.5 * raw.probes[0].coefficient) ** 2 * size
        if index < Curvature.EVERY_STEP or index % Curvature.INTERVAL == 0:
            count = zo.normaliser.count - 1
            mean += (((plus + minus - 2 * centre) / 1e-4) ** 2 - mean) * max(2 / (count + 3), 1 / 32)
        assert zo.normaliser.mean_square == pytest.approx(mean, rel=1e-9)
        assert record.probes[0].coefficient == pytest.approx(raw.probes[0].coefficient / math.sqrt(mean), rel=2**-23)
    assert zo.normaliser.count == Curvature.EVERY_STEP + (60 - Curvature.EVERY_STEP + 7) // 8


def test_where_one_side_is_measured_the_curvature_measures_both_along_the_first_direction() -> None:
    state: dict[str, Any] = {"mean_square": 2.0, "count": 5}
    one, two = Curvature(two_sided=False, **state), Curvature(**state)
    assert one.extra(0, (7, 8), 0.5) == (Point(7, 0.5), Point(7, -0.5), Point(7, 0.0))
    one.see(0, (), (9.0, 8.0, 3.0, 2.5, 1.0), 0.5)
    two.see(0, (), (3.0, 2.5, 1.0), 0.5)
    assert one.saved() == two.saved()
    assert one.mean_square > 2.0
    zo = engine(estimator={"name": "es", "shaping": "center"}, num_probes=2, normalise=CURVATURE)
    assert run(zo)[-1].probes
    assert zo.normaliser == Curvature(zo.normaliser.mean_square, STEPS, zo.normaliser.size, two_sided=False)


def test_fzoo_follows_slopes_where_it_is_normalised_by_the_curvature() -> None:
    """As the unbiased one-sided estimate from the loss at the weights, along the same directions; sigma is no part."""
    settings: dict[str, Any] = {"estimator": "fzoo", "num_probes": 3, "lr": 0.0, "eps": 1e-2}
    plain, zo = engine(**settings, normalise=False), engine(**settings, normalise=CURVATURE)
    for index in range(STEPS):
        points: list[float] = []
        loss = closure("mlp", zo.model, index)

        def probe(kept: list[float] = points, loss: Any = loss) -> torch.Tensor:
            found = loss().detach().double()
            kept.append(float(found))
            return found

        record, raw = zo.step(probe), plain.step(closure("mlp", plain.model, index))
        assert zo.normaliser is not None
        centre, *around = points[-7:-3]
        for one, other, perturbed in zip(record.probes, raw.probes, around, strict=True):
            slope = (perturbed - centre) / 1e-2
            assert one.seed == other.seed
            assert one.coefficient == pytest.approx(slope / 3 / zo.normaliser.scale, rel=1e-6)
    assert zo.normaliser.count == STEPS


def test_eps_is_wider_where_the_curvature_is_measured() -> None:
    """Rounding of the losses is divided by its square; an eps of one's own always counts."""
    assert ZeroOrder(tiny("mlp"), estimator="fzoo").eps == 1e-3
    assert ZeroOrder(tiny("mlp"), estimator="fzoo", lr="auto").eps == 1e-3
    assert ZeroOrder(tiny("mlp"), estimator="fzoo", lr=1e-3).eps == 1e-4
    assert ZeroOrder(tiny("mlp"), estimator="fzoo", lr=1e-3, normalise=CURVATURE).eps == 1e-3
    assert ZeroOrder(tiny("mlp"), estimator="fzoo", rule="sign").eps == 1e-4
    assert ZeroOrder(tiny("mlp"), estimator="fzoo", eps=3e-5).eps == 3e-5


def test_a_step_of_the_curvature_is_a_part_of_newtons_step() -> None:
    """On a parabola along one axis a rate of 1 ends at the minimum, after the pseudo-sample has lost its weight."""
    weight = torch.nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
    model = torch.nn.Module()
    model.register_parameter("weight", weight)
    zo = ZeroOrder(model, lr=1.0, normalise=CURVATURE)
    for _ in range(200):
        zo.step(lambda: 500.0 * (model.weight[0].detach() - 7.0) ** 2)
    assert float(weight.detach()) == pytest.approx(7.0, abs=1e-6)


@pytest.mark.parametrize("settings", CASES)
def test_the_scale_of_the_loss_cancels(settings: dict[str, Any]) -> None:
    """Times a power of two, which changes no rounding, every weight has the same bits."""
    small, large = (engine(**{**settings, "clip": None}) for _ in range(2))
    for index in range(STEPS):
        small.step(closure("mlp", small.model, index))
        loss = closure("mlp", large.model, index)
        large.step(lambda loss=loss: loss() * 1024.0)
    assert same_bits(weights(small.model), weights(large.model))


@pytest.mark.parametrize("settings", CASES)
def test_replay_resume_and_repetition_give_the_same_bits(settings: dict[str, Any], tmp_path: Path) -> None:
    whole = engine(**settings)
    log = SeedLogWriter.attach(whole, tmp_path / "log")
    run(whole, 3)
    file = io.BytesIO()
    torch.save({"model": whole.model.state_dict(), "zo": whole.state_dict()}, file)
    run(whole)
    log.close()
    ends = weights(whole.model)

    base = tiny("mlp")
    assert replay(base, tmp_path / "log") == STEPS
    assert same_bits(weights(base), ends)

    file.seek(0)
    kept = torch.load(file, weights_only=True)
    resumed = engine(**settings)
    resumed.model.load_state_dict(kept["model"])
    resumed.load_state_dict(kept["zo"])
    run(resumed)
    assert same_bits(weights(resumed.model), ends)

    for start in (engine(**settings), resumed_at(kept, settings)):  # from the log's start, and from a checkpoint
        follower = SeedLogWriter.attach(start, tmp_path / "log", follow=True)
        while (entry := follower.logged()) is not None:
            start.repeat(entry.probes, entry.loss, entry.normaliser)
            start.optimizer.step()
        follower.close()
        assert same_bits(weights(start.model), ends)
        assert start.normaliser == whole.normaliser
        assert start.braking.saved() == whole.braking.saved()

    continued = engine(**settings)
    replay(continued, tmp_path / "log")
    assert continued.normaliser == whole.normaliser


def resumed_at(kept: dict[str, Any], settings: dict[str, Any]) -> ZeroOrder:
    zo = engine(**settings)
    zo.model.load_state_dict(kept["model"])
    zo.load_state_dict(kept["zo"])
    return zo


@pytest.mark.parametrize("kind", KINDS)
def test_a_log_has_the_coefficients_that_were_applied(kind: str, tmp_path: Path) -> None:
    zo = engine(normalise=kind)
    log = SeedLogWriter.attach(zo, tmp_path / "log")
    records = run(zo)
    log.close()
    for entry, record in zip(SeedLog.read(tmp_path / "log").steps, records, strict=True):
        assert entry.probes == record.probes
        assert entry.normaliser == record.normaliser
    data = (tmp_path / "log").read_bytes()
    assert struct.unpack_from("<I", data, 8)[0] == NORMALISED


def test_logs_of_other_steps_keep_their_format(tmp_path: Path) -> None:
    zo = engine(normalise=False)
    log = SeedLogWriter.attach(zo, tmp_path / "log")
    run(zo)
    log.close()
    assert struct.unpack_from("<I", (tmp_path / "log").read_bytes(), 8)[0] == VERSION
    assert {entry.normaliser for entry in SeedLog.read(tmp_path / "log").steps} == {None}


@pytest.mark.parametrize("kind", KINDS)
def test_skipped_steps_do_not_count(kind: str) -> None:
    zo = engine(normalise=kind)
    run(zo, 2)
    before = zo.normaliser and zo.normaliser.saved()
    zo.step(lambda: torch.tensor(math.nan))
    zo.skip("no loss")
    assert zo.normaliser is not None
    assert zo.normaliser.saved() == before


def test_the_prior_waits_for_the_first_slope() -> None:
    """A flat step is one that was left out: what follows has the same bits, also repeated from a log."""
    flat, skipped, again = (engine(normalise=CURVATURE, lr=0.25, eps=1e-3) for _ in range(3))
    for _ in range(40):  # more than are measured in every step
        flat.step(lambda: torch.tensor(1.0))
        skipped.skip("flat")
    records = run(flat, 44)
    run(skipped, 44)
    assert same_bits(weights(flat.model), weights(skipped.model))
    assert flat.normaliser == skipped.normaliser
    again.at(39)
    again.repeat((Probe(again.noise.seed(0, 39, 0), 0.0),), 1.0, 0.0)
    again.optimizer.step()
    for record in records:
        again.repeat(record.probes, record.loss, record.normaliser)
        again.optimizer.step()
    assert again.normaliser == flat.normaliser


@pytest.mark.parametrize("kind", KINDS)
def test_losses_that_agree_are_no_division_by_zero(kind: str) -> None:
    zo = engine(normalise=kind)
    before = weights(zo.model)
    record = zo.step(lambda: torch.tensor(1.0))
    assert [probe.coefficient for probe in record.probes] == [0.0]
    assert same_bits(weights(zo.model), before)


def test_no_step_is_longer_than_stated() -> None:
    """A projected gradient that is suddenly a million times larger moves the weights by at most lr / sqrt(1 - beta)."""
    zo = engine()
    run(zo, 5)
    before = weights(zo.model)
    loss = closure("mlp", zo.model, 5)
    zo.step(lambda: loss() * 1e6)
    bound = LR / math.sqrt(1 - BETA) * (1 + 2**-20)  # and roundings of float32
    assert max(float((value - before[name]).abs().max()) for name, value in weights(zo.model).items()) <= bound


@pytest.mark.parametrize("kind", KINDS)
def test_a_trial_of_the_range_test_leaves_it_alone(kind: str) -> None:
    zo = engine(normalise=kind)
    run(zo, 3)
    assert zo.normaliser is not None
    before = zo.normaliser.saved()
    zo.suggest_lr([closure("mlp", zo.model, index) for index in range(3)])
    assert zo.normaliser.saved() == before


@pytest.mark.parametrize("kind", KINDS)
def test_other_weights_are_measured_anew(kind: str) -> None:
    """The curvature of a head says nothing of that of the whole model, which may be a hundred times larger."""
    model = tiny("mlp")
    model.inner.requires_grad_(False)
    zo = ZeroOrder(model, lr=LR, normalise=kind)
    run(zo, 3)
    model.inner.requires_grad_(True)
    run(zo, 4)
    assert zo.normaliser is not None
    assert zo.normaliser.count == 1
    if isinstance(zo.normaliser, Curvature):
        assert zo.normaliser.size == sum(parameter.numel() for parameter in model.parameters())


# Where it is on


def test_it_is_on_where_no_rate_was_given() -> None:
    model = tiny("mlp")
    assert isinstance(ZeroOrder(model).normaliser, Curvature)
    assert ZeroOrder(model, lr="auto").normaliser is not None
    assert ZeroOrder(model, optimizer=ZOOptimizer(model.parameters())).normaliser is not None
    assert isinstance(ZeroOrder(model, estimator="fzoo").normaliser, Curvature)
    assert ZeroOrder(model, estimator="fzoo", lr=1e-6).normaliser is None
    assert ZeroOrder(model, estimator="es").normaliser is None  # the scale of the loss cancels already
    assert ZeroOrder(model, rule="sign").normaliser is None
    assert ZeroOrder(model, estimator="fzoo", rule="sign").normaliser is None
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    assert ZeroOrder(model, optimizer=optimizer, normalise=True).normaliser is not None
    assert ZeroOrder(model, lr=1e-6).normaliser is None
    assert ZeroOrder(model, optimizer=ZOOptimizer(model.parameters(), lr=1e-6)).normaliser is None
    assert ZeroOrder(model, optimizer=torch.optim.SGD(model.parameters(), lr=1e-6)).normaliser is None
    assert ZeroOrder(model, normalise=False).normaliser is None
    assert ZeroOrder(model, lr=1e-6, normalise=True).normaliser is not None


def test_the_default_rate_depends_on_what_moves(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("mlp")
    zo = ZeroOrder(model)
    assert zo.lr == NEWTON == default_lr(zo.slots, zo.rule, CURVATURE)
    size = sum(parameter.numel() for parameter in model.parameters())
    assert ZeroOrder(model, rule="sign").lr == pytest.approx(0.06 / math.sqrt(size))
    assert ZeroOrder(model, estimator="es").lr == pytest.approx(30 * 0.06 / math.sqrt(size))
    assert ZeroOrder(model, estimator="fzoo").lr == 8 * NEWTON
    assert ZeroOrder(model, rule="momentum").lr == pytest.approx(zo.lr * 0.1)
    assert ZeroOrder(model, num_probes=4).lr == pytest.approx(zo.lr * 4)
    assert ZeroOrder(model, optimizer=ZOOptimizer(model.parameters())).lr == zo.lr
    zo.step(closure("mlp", model))
    zo.step(closure("mlp", model))
    (line,) = [line for line in caplog.messages if "no learning rate was given" in line]
    assert f"{zo.lr:.2g}" in line
    assert f"eps={zo.eps:g}" in line
    caplog.clear()
    ZeroOrder(model, lr=1e-6).step(closure("mlp", model))
    assert not [line for line in caplog.messages if "no learning rate was given" in line]


def test_rates_in_some_groups_are_an_error() -> None:
    first, second = itertools.islice(tiny("mlp").parameters(), 2)
    with pytest.raises(ConfigError, match="lr is missing in group 1"):
        ZOOptimizer([{"params": [first], "lr": 1e-3}, {"params": [second]}])


def test_a_continued_run_keeps_what_it_had_unless_told_otherwise() -> None:
    earlier = engine(normalise=False)
    run(earlier, 2)
    state = earlier.state_dict()
    later = ZeroOrder(tiny("mlp"))
    later.load_state_dict(state)
    assert (later.normaliser, later.lr) == (None, LR)
    with pytest.raises(StateError, match="normalise"):
        engine(normalise=True).load_state_dict(state)


def test_a_repeated_step_needs_the_state_of_the_normaliser() -> None:
    zo = engine()
    (record,) = run(zo, 1)
    with pytest.raises(StateError, match="normaliser=None"):
        zo.repeat(record.probes, record.loss)
