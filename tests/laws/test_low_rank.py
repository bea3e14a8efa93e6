"""Law: a direction of low rank is U V^T / sqrt(r), and probes that never make it measure the same losses."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from models import EVERY, FAMILIES, closure, gpt2, tiny
from probing import EPS, POINTS, measure
from torch import Tensor, nn
from traces import left_as_found

from zo_core import LowRank, Point, Rademacher, Spsa, ZeroOrder, ZOConfig, derive_seed
from zo_core.noise.direction import CPU_CHUNK, FLOAT_DTYPES
from zo_core.probing.functional import Sight
from zo_core.probing.materialise import Materialised

CPU = torch.device("cpu")
SHAPE = torch.Size([12, 5, 4])
U = 2.0**-24  # unit roundoff of float32


# The noise


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_matrix_is_the_product_of_two_factors_of_signs(rank: int) -> None:
    noise = LowRank(rank)
    seed = noise.seed(3, 7, 0)
    z = noise.values(seed, "w", SHAPE)
    left, right = noise.left(seed, "w", SHAPE, CPU), noise.right(seed, "w", SHAPE, CPU)
    assert left.shape == (12, rank)
    assert right.shape == (rank, 20)
    assert {abs(value) for value in (*left.flatten().tolist(), *right.flatten().tolist())} == {1.0}
    exact = left.double() @ right.double() / math.sqrt(rank)
    assert torch.allclose(z.view(12, 20).double(), exact, rtol=4 * U, atol=0.0)
    assert torch.linalg.matrix_rank(z.view(12, 20)) == rank


def test_the_left_factor_is_new_every_step_and_the_right_one_every_window() -> None:
    noise = LowRank(refresh=5)
    seeds = [noise.seed(0, step, 0) for step in range(15)]
    rights = [noise.right(seed, "w", SHAPE, CPU) for seed in seeds]
    lefts = [noise.left(seed, "w", SHAPE, CPU) for seed in seeds]
    for step, right in enumerate(rights):
        assert torch.equal(right, rights[step - step % 5])
        assert all(not torch.equal(lefts[step], other) for other in lefts[:step])
    assert not torch.equal(rights[4], rights[5])
    assert not torch.equal(rights[9], rights[10])
    # Directions of one step, and slots, have their own.
    assert not torch.equal(rights[0], noise.right(noise.seed(0, 0, 1), "w", SHAPE, CPU))
    assert not torch.equal(rights[0], noise.right(seeds[0], "v", SHAPE, CPU))
    forever = LowRank(refresh=None)
    assert torch.equal(*(forever.right(forever.seed(0, step, 0), "w", SHAPE, CPU) for step in (0, 10**6)))


def test_what_has_one_dimension_has_the_signs_of_the_default_noise() -> None:
    noise = LowRank()
    seed = noise.seed(3, 7, 1)
    assert torch.equal(noise.values(seed, "b", torch.Size([99])), Rademacher().z(derive_seed(3, 7, 1), "b", 0, 99))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [[3, 100], [700, 800], [2, CPU_CHUNK + 7], [5, 1], [4, 0]], ids=str)
def test_moving_in_chunks_is_the_formula_on_the_whole(dtype: torch.dtype, shape: list[int]) -> None:
    noise = LowRank(3)
    terms = ((noise.seed(0, 1, 0), 1e-3), (noise.seed(0, 1, 1), -0.25))
    direction = noise.direction("w", torch.Size(shape), terms)
    theta = torch.linspace(-1, 1, math.prod(shape), dtype=torch.float64).view(shape).to(dtype)
    total = torch.zeros(shape)
    if total.numel():
        for seed, c in terms:
            left = noise.left(seed, "w", theta.shape, CPU) * torch.tensor(c / math.sqrt(3)).float()
            right = noise.right(seed, "w", theta.shape, CPU)
            for k in range(3):
                total = total + left[:, k : k + 1] * right[k]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = (theta.to(wide) + total.to(wide)).to(dtype)
    assert torch.equal(direction.add_to(theta, out=torch.empty_like(theta)), expected)


def matrices(noise: LowRank, seed: int, count: int, rows: int = 4, columns: int = 6) -> Tensor:
    """Independent directions, float64 ``[count, rows, columns]``, from the entries of one long pair of factors."""
    shape = torch.Size([count * rows, count * columns])
    left = noise.left(seed, "w", shape, CPU).view(count, rows, noise.rank).double()
    right = noise.right(seed, "w", shape, CPU).view(noise.rank, count, columns).transpose(0, 1).double()
    return left @ right / math.sqrt(noise.rank)


def assert_mean(samples: Tensor, expected: float) -> None:
    assert abs(samples.mean().item() - expected) <= 5 * samples.std().item() / math.sqrt(len(samples)) + 1e-6


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_mean_variance_and_fourth_moment_are_those_that_are_stated(rank: int) -> None:
    noise = LowRank(rank)
    z = matrices(noise, 5, 20_000)[:, 1, 2]
    for power, expected in ((1, 0.0), (2, 1.0), (4, noise.matrix_kurtosis)):
        assert_mean(z**power, expected)


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("num_probes", [1, 3])
def test_the_second_moment_of_the_estimate_is_the_closed_form(rank: int, num_probes: int) -> None:
    noise, d = LowRank(rank), 24
    gradient = torch.linspace(-1.0, 2.0, d, dtype=torch.float64).view(4, 6)
    z = [matrices(noise, noise.seed(1, 50 * i, i), 20_000) for i in range(num_probes)]
    estimate = sum((one * gradient).sum((1, 2), keepdim=True) * one for one in z) / num_probes
    expected = (d + num_probes + noise.matrix_kurtosis - 2) / num_probes * gradient.square().sum().item()
    assert_mean(estimate.square().sum((1, 2)), expected)


def test_a_quadratic_contracts_at_the_rate_of_the_closed_form() -> None:
    # On |x|^2 / 2 with lr = n / (d + n + kappa - 2), |x|^2 shrinks by 1 - lr on average.
    noise, n, d = LowRank(2), 2, 24
    lr = n / (d + n + noise.matrix_kurtosis - 2)
    x = torch.linspace(-1.0, 2.0, d, dtype=torch.float64).view(4, 6)
    z = [matrices(noise, noise.seed(2, 50 * i, i), 5_000) for i in range(n)]
    points = Spsa().points(tuple(range(n)), 1e-3)
    losses = torch.stack([(x + p.scale * z[p.seed]).square().sum((1, 2)) / 2 for p in points], 1).tolist()
    coefficients = torch.tensor([Spsa().estimate(row, 1e-3).coefficients for row in losses], dtype=torch.float64)
    step = sum(coefficients[:, i, None, None] * z[i] for i in range(n)) / n
    assert_mean((x - lr * step).square().sum((1, 2)) / x.square().sum(), 1 - lr)


@pytest.mark.parametrize("field", [{"rank": 0}, {"rank": None}, {"rank": 2.0}, {"refresh": 0}, {"refresh": True}])
def test_impossible_ranks_and_windows_are_refused(field: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        ZOConfig(noise={"name": "low_rank", **field})


# Functional probes


def materialised(model: nn.Module) -> ZeroOrder:
    """An engine whose probes are made of copies."""
    zo = ZeroOrder(model, noise="low_rank")
    zo.oracle.realisation = Materialised(model, zo.slots, zo._perturbation)
    return zo


@pytest.mark.parametrize(("name", "tied"), [(name, True) for name in EVERY] + [(name, False) for name in FAMILIES])
def test_functional_and_materialised_probes_measure_the_same(name: str, tied: bool) -> None:
    if name == "unseen":
        model = tiny(name, tied)  # what Python cannot see is copied as a whole by both, so they agree exactly
        assert ZeroOrder(model, noise="low_rank").oracle.losses(POINTS, closure(name, model)) == materialised(
            model
        ).oracle.losses(POINTS, closure(name, model))
        return
    model = tiny(name, tied, torch.float64)
    with left_as_found(model):
        functional = ZeroOrder(model, noise="low_rank").oracle.losses(POINTS, closure(name, model))
    copied = materialised(model).oracle.losses(POINTS, closure(name, model))
    # Losses are float32 where models or the upcast of losses make them so.
    for a, b, c in zip(functional, copied, [*copied[1:], copied[0]], strict=True):
        assert abs(a - b) <= 1e-6 * abs(b - c) or abs(a - b) <= 4 * U * abs(b)
    assert len({loss.item() for loss in functional}) == len(POINTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_linear_layer_is_within_the_bound_of_rounding(dtype: torch.dtype) -> None:
    n, m, k = 300, 40, 2
    layer = nn.Linear(n, m, dtype=dtype)
    x = torch.randn(7, n, dtype=dtype)
    seen: dict[str, list[Tensor]] = {"functional": [], "copied": []}
    for kind, zo in (("functional", ZeroOrder(layer, noise="low_rank")), ("copied", materialised(layer))):
        zo.oracle.losses(POINTS, lambda kind=kind: seen[kind].append(layer(x)) or 0.0)
    zo = ZeroOrder(layer, noise="low_rank")
    unit = torch.finfo(dtype).eps / 2
    for point, a, b in zip(POINTS, seen["functional"], seen["copied"], strict=True):
        left, right = zo._perturbation(zo.slots[0], point).factors(CPU)
        # A sum of n products is off by at most n u times the sum of their sizes (Higham, section 3.1); each side
        # makes one over n inputs of the weights or of the factors, one over k, and a few single roundings.
        size = x.abs() @ (layer.weight.abs() + (left.abs() @ right.abs())).t() + layer.bias.abs() + abs(point.scale)
        assert bool(((a - b).abs() <= 2 * (n + k + 6) * unit * size).all())


@pytest.mark.parametrize("name", ["llama", "opt", "bert", "t5", "gpt2", "functional_tied_head", "mlp"])
def test_no_matrix_of_a_language_model_is_copied(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "gpt2":
        model, loss = gpt2()
    else:
        model = tiny(name)
        loss = closure(name, model)
    copied: list[torch.Size] = []
    copy_of = Sight.copy
    monkeypatch.setattr(Sight, "copy", lambda self, slot: (copied.append(slot.tensor.shape), copy_of(self, slot))[1])
    ZeroOrder(model, noise="low_rank").oracle.losses(POINTS, loss)
    assert not [shape for shape in copied if len(shape) > 1]


def test_conv1d_of_transformers_takes_the_low_rank_term() -> None:
    model, loss = gpt2()
    functional = ZeroOrder(model, noise="low_rank").oracle.losses(POINTS, loss)
    for a, b in zip(functional, materialised(model).oracle.losses(POINTS, loss), strict=True):
        assert abs(a - b) <= 4 * U * abs(b)


def test_a_weight_used_out_of_turn_is_served_by_a_copy() -> None:
    model = nn.ModuleDict({"body": nn.Linear(6, 6), "head": nn.Linear(6, 9, bias=False)}).double()
    x = torch.randn(4, 6, dtype=torch.float64)

    def loss() -> Tensor:  # as TRL does with the weight of its language model's head
        return F.cross_entropy(torch.tanh(model["body"](x)) @ model["head"].weight.t(), torch.tensor([0, 1, 2, 8]))

    functional = ZeroOrder(model, noise="low_rank").oracle.losses(POINTS, loss)
    for a, b in zip(functional, materialised(model).oracle.losses(POINTS, loss), strict=True):
        assert abs(a - b) <= 4 * U * abs(b)
    assert len({value.item() for value in functional}) == len(POINTS)


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("cache", [True, False])
def test_probes_under_autocast_see_the_perturbation(name: str, cache: bool) -> None:
    model = tiny(name)
    loss = closure(name, model)
    points = (Point(11, EPS), Point(11, -EPS), Point(12, 0.0), Point(12, 0.3))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
        a = ZeroOrder(model, noise="low_rank").oracle.losses(points, loss)
        b = materialised(model).oracle.losses(points, loss)
    exact = ZeroOrder(model, noise="low_rank").oracle.losses(points, loss)
    for one, other, true in zip(a, b, exact, strict=True):
        assert abs(one - true) <= 2 * abs(other - true) + 0.01  # one unit of bf16 near 4 is 0.03


def test_the_same_step_comes_out_whatever_the_threads_and_the_backend() -> None:
    found = []
    for threads, backend in ((1, "eager"), (2, "eager"), (1, "compile")):
        torch.set_num_threads(threads)
        model = nn.Linear(300, 200, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.linspace(-1, 1, 60_000).view(200, 300))
        zo = ZeroOrder(model, noise={"name": "low_rank", "refresh": 1}, backend=backend, lr=1e-2)
        for loss in (2.0, 1.0, 3.0, 0.5, 1.0, 1.5):
            zo._plan = None
            zo.measure(lambda loss=loss: loss)
            zo._plan.sums = [torch.tensor(loss).double(), torch.tensor(1.0).double()]
            zo.optimizer.step()
        zo.close()
        found.append(copy.deepcopy(model.weight.data))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_measuring_touches_nothing_and_is_repeatable() -> None:
    model = tiny("llama")
    with left_as_found(model):
        first = measure(model, closure("llama", model))
    zo = ZeroOrder(model, noise="low_rank")
    with left_as_found(model), pytest.raises(ZeroDivisionError):
        zo.oracle.losses(POINTS, lambda: 1 / 0)
    assert first == measure(model, closure("llama", model))
