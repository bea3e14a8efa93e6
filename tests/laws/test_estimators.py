"""Law: an estimator is a pure function of losses, and its probes have the second moment that theory gives them."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from zo_core import ESTIMATORS, NOISES, ElementNoise, Estimator, Fzoo, Noise, Point, Spsa, ZeroOrder, derive_seed
from zo_core.estimators.base import ROUNDING

#: Distributions of independent elements; the other noises say where one of these is applied.
ELEMENTS = [noise for noise in map(NOISES.resolve, NOISES) if isinstance(noise, ElementNoise)]
EVERY_NOISE = pytest.mark.parametrize("noise", ELEMENTS, ids=lambda noise: noise.name)
EVERY_ESTIMATOR = pytest.mark.parametrize(
    "estimator", [ESTIMATORS.resolve(name) for name in ESTIMATORS], ids=list(ESTIMATORS)
)
SEEDS = tuple(derive_seed(0, 0, i) for i in range(5))


class Weights(nn.Module):
    """A vector in float64, in which differences of losses are exact enough to be looked at one by one."""

    def __init__(self, values: Tensor):
        super().__init__()
        self.x = nn.Parameter(values.double())


# The contract


@EVERY_ESTIMATOR
def test_an_estimator_is_a_frozen_value(estimator: Estimator) -> None:
    assert dataclasses.is_dataclass(estimator)
    assert estimator == type(estimator)()
    assert hash(estimator) == hash(type(estimator)())
    with pytest.raises(dataclasses.FrozenInstanceError):
        estimator.name = "other"  # type: ignore[misc]


@EVERY_ESTIMATOR
def test_points_and_estimates_are_pure(estimator: Estimator) -> None:
    points = estimator.points(SEEDS, 1e-2)
    losses = [0.5 + 0.01 * i * i for i in range(len(points))]
    given_losses = list(losses)
    first = estimator.estimate(losses, 1e-2)
    state = torch.get_rng_state()
    assert estimator.points(list(SEEDS), 1e-2) == points
    assert estimator.estimate(tuple(losses), 1e-2) == first
    assert losses == given_losses
    assert torch.equal(torch.get_rng_state(), state)


@EVERY_ESTIMATOR
def test_every_direction_is_measured_at_a_distance_of_eps_and_none_beyond(estimator: Estimator) -> None:
    for count in range(estimator.min_probes, 6):
        points = estimator.points(SEEDS[:count], 0.25)
        assert {point.seed for point in points if point.scale} == set(SEEDS[:count])
        assert {abs(point.scale) for point in points} <= {0.0, 0.25}
        assert len(set(points)) == len(points)


@EVERY_ESTIMATOR
@given(slopes=st.lists(st.integers(-(2**20), 2**20), min_size=5, max_size=5))
def test_projected_gradients_of_a_linear_loss_are_its_slopes(estimator: Estimator, slopes: list[int]) -> None:
    # Whole numbers times a power of two: every operation is exact.
    slope = dict(zip(SEEDS, map(float, slopes), strict=True))
    losses = [3.0 + slope[point.seed] * point.scale for point in estimator.points(SEEDS, 2.0**-10)]
    estimate = estimator.estimate(losses, 2.0**-10)
    # Losses that are only compared with one another say nothing of a single slope.
    assert estimate.projected_grads == (() if estimator.compares else tuple(map(float, slopes)))
    assert len(estimate.coefficients) == len(SEEDS)


@EVERY_ESTIMATOR
@pytest.mark.parametrize("noise", [NOISES.resolve(name) for name in NOISES if name != "sparse"])  # see test_sparse.py
def test_steps_go_downhill(estimator: Estimator, noise: Noise) -> None:
    model = Weights(torch.linspace(-1, 1, 16))
    zo = ZeroOrder(model, estimator=estimator, noise=noise, num_probes=4, eps=1e-3, lr=0.1)
    losses = [float(zo.step(lambda: model.x.square().sum() / 2)) for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]


# SPSA


def test_spsa_by_hand() -> None:
    assert Spsa().points((5, 6), 0.5) == (Point(5, 0.5), Point(5, -0.5), Point(6, 0.5), Point(6, -0.5))
    estimate = Spsa().estimate((3.0, 1.0, 1.0, 2.0), 0.5)
    assert estimate.projected_grads == estimate.coefficients == (2.0, -1.0)
    assert estimate.skip is None


def estimates(noise: Noise, num_probes: int, x: Tensor, loss: Callable[[Tensor], Tensor], count: int) -> Tensor:
    """Independent gradient estimates at ``x``, ``[count, d]``; ``loss`` maps ``[count, d]`` to ``[count]``."""
    seeds = SEEDS[:num_probes]
    z = {seed: noise.z(seed, "x", 0, count * len(x)).view(count, len(x)).double() for seed in seeds}
    points = Spsa().points(seeds, 1e-2)
    losses = torch.stack([loss(x + point.scale * z[point.seed]) for point in points], dim=1)
    coefficients = torch.tensor([Spsa().estimate(row, 1e-2).coefficients for row in losses.tolist()])
    return sum(c.unsqueeze(1) * z[seed] for c, seed in zip(coefficients.double().T, seeds, strict=True)) / num_probes


def assert_mean(samples: Tensor, expected: float) -> None:
    """Within five standard errors, as the samples themselves show them, and the rounding of float32 coefficients."""
    error = samples.std().item() / math.sqrt(len(samples))
    assert abs(samples.mean().item() - expected) <= 5 * error + 2.0**-23 * abs(expected)


@EVERY_NOISE
@pytest.mark.parametrize("num_probes", [1, 4])
def test_the_second_moment_of_the_estimate_is_the_closed_form(noise: Noise, num_probes: int) -> None:
    d, n = 10, num_probes
    gradient = torch.linspace(-1.0, 2.0, d, dtype=torch.float64)
    found = estimates(noise, n, torch.zeros(d, dtype=torch.float64), lambda x: x @ gradient, 20_000)
    norm = gradient.square().sum().item()
    assert_mean(found.square().sum(1), (d + n + noise.kurtosis - 2) / n * norm)
    for estimated, true in zip(found.T, gradient.tolist(), strict=True):  # and it is unbiased
        assert_mean(estimated, true)


@EVERY_NOISE
@pytest.mark.parametrize("num_probes", [1, 4])
def test_the_best_learning_rate_contracts_a_quadratic_as_theory_says(noise: Noise, num_probes: int) -> None:
    d, n = 10, num_probes
    x = torch.linspace(-1.0, 2.0, d, dtype=torch.float64)
    gradients = estimates(noise, n, x, lambda x: x.square().sum(1) / 2, 20_000)
    # E|x - lr G|^2 = (1 - 2 lr + lr^2 M) |x|^2 with M the second moment above: least at lr = 1/M, where it is 1 - 1/M.
    # For normal directions that is 1 - n / (d + n + 1).
    lr = n / (d + n + noise.kurtosis - 2)
    contraction = (x - lr * gradients).square().sum(1) / x.square().sum()
    assert_mean(contraction, 1 - lr)


# FZOO


def test_fzoo_by_hand() -> None:
    assert Fzoo().points((5, 6), 0.5) == (Point(5, 0.0), Point(5, 0.5), Point(6, 0.5))
    # The l_i are 1.5, 0.5 and 1.0: mean 1, standard deviation sqrt((0.25 + 0.25 + 0) / 2) = 0.5.
    estimate = Fzoo().estimate((1.0, 1.5, 0.5, 1.0), 0.25)
    assert estimate.projected_grads == (2.0, -2.0, 0.0)
    assert estimate.coefficients == (1.0, -1.0, 0.0)


def test_an_fzoo_step_is_the_formula_of_the_paper() -> None:
    model = Weights(torch.linspace(-1, 1, 10))
    start = model.x.detach().clone()
    eps, lr, n = 1e-2, 0.125, 4
    seen: list[float] = []

    def loss() -> Tensor:
        value = (model.x - 0.3).pow(4).sum()
        seen.append(value.item())
        return value

    ZeroOrder(model, estimator="fzoo", num_probes=n, eps=eps, lr=lr).step(loss)
    _, l0, *ls = seen  # the first step measures one point twice
    sigma = statistics.stdev(ls)
    z = [NOISES.resolve("rademacher").z(derive_seed(0, 0, i), "x", 0, 10).double() for i in range(n)]
    expected = start - lr * sum((li - l0) / (n * sigma) * zi for li, zi in zip(ls, z, strict=True))
    # n coefficients and their sums in float32: an error of at most n * 2**-23 of their absolute sum.
    reach = lr * sum(abs(li - l0) for li in ls) / (n * sigma)
    assert (model.x.detach() - expected).abs().max().item() <= n * 2.0**-23 * reach


@given(losses=st.lists(st.integers(-1000, 1000), min_size=4, max_size=8, unique=True), power=st.integers(-60, 60))
def test_the_scale_of_the_loss_and_eps_cancel_in_fzoo(losses: list[int], power: int) -> None:
    plain = Fzoo().estimate([float(loss) for loss in losses], 1e-2)
    assert plain.skip is None
    scaled = Fzoo().estimate([loss * 2.0**power for loss in losses], 1e-4)
    assert (scaled.coefficients, scaled.skip) == (plain.coefficients, None)


@pytest.mark.parametrize("scale", [2.0**-30, 1.0, 2.0**30])
@pytest.mark.parametrize("lr", [None, 1e-3])
def test_a_small_loss_is_learnt_by_fzoo_as_a_large_one(scale: float, lr: float | None) -> None:
    """Times a power of two, which changes no rounding, every weight has the same bits."""
    found = []
    for factor in (1.0, scale):
        model = Weights(torch.linspace(-1, 1, 10))
        zo = ZeroOrder(model, estimator="fzoo", lr=lr)
        for _ in range(4):
            record = zo.step(lambda factor=factor, x=model.x: factor * (x - 0.3).pow(4).sum())
            assert record.skipped is None
        found.append(model.x.detach())
    assert torch.equal(*found)


def test_fzoo_skips_a_step_whose_losses_agree() -> None:
    for scale in (1.0, 1e-9, 1e9):
        near = Fzoo().estimate((scale, scale, scale * (1.0 + ROUNDING / 4)), 1e-2)
        assert near.skip is not None
        assert "agree" in near.skip
        assert Fzoo().estimate((scale, scale, scale * (1.0 + 4 * ROUNDING)), 1e-2).skip is None
    assert Fzoo().estimate((1.0, 0.0, 0.0), 1e-2).skip is not None

    model = Weights(torch.ones(3))
    zo = ZeroOrder(model, estimator="fzoo")
    record = zo.step(lambda: model.x.sum() * 0 + 2.0)
    assert record.skipped is not None
    assert record.probes == ()
    assert float(record) == 2.0
    assert torch.equal(model.x.detach(), torch.ones(3).double())
    assert zo.step_count == 1
