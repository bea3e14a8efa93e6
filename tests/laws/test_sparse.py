"""Law: only weights of small magnitude are perturbed or moved, by thresholds of the start and a mask of the step."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from int4_models import Quantised, scales
from int4_models import closure as quantised_loss
from models import batch, closure, tiny
from sparse_helpers import ALL, engine, run
from torch import Tensor, nn
from traces import same_bits, weights

from zo_core import (
    NOISES,
    ConfigError,
    Gaussian,
    Int4Scales,
    Noise,
    Point,
    Rademacher,
    Sparse,
    ZeroOrder,
    ZOConfig,
    derive_seed,
)
from zo_core.noise import Passes, sparse
from zo_core.noise.sparse import threshold

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def small(zo: ZeroOrder, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """By parameter: which elements of ``before`` are at or below the threshold of their slot."""
    keys = {id(tensor): slot.key for slot in zo.slots for tensor in slot.tensors}
    limits = {name: zo.optimizer.thresholds[keys[id(p)]] for name, p in zo.model.named_parameters()}
    return {name: before[name].abs() <= limit for name, limit in limits.items()}


# The thresholds


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [2, 7, 1000])
def test_a_threshold_is_an_order_statistic_of_the_magnitudes(
    count: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "CHUNK", 300)
    for scale in (1e-6, 0.02, 300.0):
        w = (torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(count)) * scale).to(dtype)
        for quantile in (1e-6, 0.2, 0.25, 0.5, 0.9, 1.0):
            rank = max(1, round(quantile * count))
            expected = w.abs().sort().values[rank - 1].item()
            found = threshold(w, quantile)
            everything = int((w.abs() <= expected).sum()) == count
            assert found == (math.inf if everything else expected)


def test_where_no_magnitude_is_above_the_threshold_the_tensor_moves_as_a_whole() -> None:
    assert threshold(torch.zeros(5), 0.25) == math.inf  # biases, LoRA's B
    assert threshold(torch.tensor([1.0, -1.0, 1.0]), 0.25) == math.inf  # a fresh norm
    assert threshold(torch.empty(0), 0.25) == math.inf
    assert threshold(torch.tensor([0.0, -0.0, 0.0, 1.0]), 0.25) == 0.0
    model = nn.Linear(4, 3)
    nn.init.zeros_(model.bias)
    zo = engine(model)
    for _ in range(3):
        before = model.bias.detach().clone()
        zo.step(lambda: (model(torch.ones(4)) - 3.0).square().sum())
        assert (model.bias != before).all()


def test_thresholds_are_those_of_the_start_whatever_happens_later() -> None:
    model = tiny("llama")
    start = weights(model)
    zo = engine(model, lr=0.1)
    run(zo, 1)
    assert zo.optimizer.thresholds.keys() == {slot.key for slot in zo.slots}  # a tied weight is one slot
    for slot in zo.slots:
        name = next(name for name, p in model.named_parameters() if p is slot.tensor)
        assert zo.optimizer.thresholds[slot.key] == threshold(start[name].flatten(), 0.25)
    first = dict(zo.optimizer.thresholds)
    run(zo, 4)
    assert zo.optimizer.thresholds == first


def test_thresholds_stay_with_their_tensors_when_more_of_them_move_and_keys_change() -> None:
    model = tiny("mlp")
    model.inner.requires_grad_(False)
    head = engine(model)
    run(head, 2, "mlp")
    assert head.optimizer.thresholds.keys() == {"weight", "bias"}
    model.inner.requires_grad_(True)
    whole = engine(model)
    whole.optimizer.take_thresholds(head.optimizer.thresholds, head.slots, whole.slots)
    found = {key.removeprefix("head."): limit for key, limit in whole.optimizer.thresholds.items()}
    assert found == head.optimizer.thresholds


def test_a_measurement_fixes_no_threshold() -> None:
    models = tiny("mlp"), tiny("mlp")
    plain, measured = (engine(model, **ALL) for model in models)
    before = measured.state_dict()
    with torch.no_grad():
        models[1].head.weight.mul_(3.0)
    measured.measure(closure("mlp", models[1]))
    assert measured.optimizer.thresholds == {}
    measured.discard()
    with torch.no_grad():
        models[1].load_state_dict(models[0].state_dict())
    assert measured.state_dict() == before
    for zo in (plain, measured):
        run(zo, 3, "mlp")
    assert same_bits(weights(models[0]), weights(models[1]))


def test_a_range_test_of_the_learning_rate_leaves_the_thresholds_of_the_start() -> None:
    models = tiny("mlp"), tiny("mlp")
    plain, tested = (engine(model, **ALL) for model in models)
    tested.suggest_lr([closure("mlp", models[1], index) for index in range(2)])
    for zo in (plain, tested):
        run(zo, 3, "mlp")
    assert same_bits(weights(models[0]), weights(models[1]))


# What moves


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("rule", ["sgd", "momentum", "sign"])
def test_large_weights_are_bit_identical_after_every_step(rule: str, weight_decay: float, dtype: torch.dtype) -> None:
    model = tiny("llama", dtype=dtype)
    zo = engine(model, rule=rule, lr=1e-4 if rule == "sign" else 1e-2, weight_decay=weight_decay, num_probes=2)
    ever = None
    start = weights(model)
    for _ in range(6):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        run(zo, 1)
        moving = small(zo, before)
        ever = moving if ever is None else {name: ever[name] | moving[name] for name in ever}
        for name, p in model.named_parameters():
            assert torch.equal(p[~moving[name]], before[name][~moving[name]]), name
            if dtype == torch.float32:
                assert (p[moving[name]] != before[name][moving[name]]).float().mean() > 0.9, name
    assert ever is not None
    for name, p in model.named_parameters():  # those that were large at every step are those of the start
        assert torch.equal(p[~ever[name]], start[name][~ever[name]])
    share = sum(int(mask.sum()) for mask in ever.values()) / sum(mask.numel() for mask in ever.values())
    assert 0.2 < share < 0.5


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_a_probe_perturbs_the_small_weights_as_the_other_noise_does_and_no_others(dtype: torch.dtype) -> None:
    model = tiny("mlp", dtype=dtype)
    zo = engine(model)
    seen: list[Tensor] = []
    layer = model.inner[3]
    handle = layer.register_forward_hook(lambda m, *_: seen.append(m.weight.detach().clone()))
    points = [Point(7, 1e-2), Point(7, -1e-2)]
    zo.oracle.losses(points, closure("mlp", model))
    handle.remove()
    moving = {name: w.abs() <= threshold(w.flatten(), 0.25) for name, w in weights(model).items()}
    for point, weight in zip(points, seen, strict=True):
        dense = Rademacher().direction("inner.3.weight", weight.shape, ((7, point.scale),))
        whole = dense.add_to(layer.weight.detach(), out=torch.empty_like(weight))
        mask = moving["inner.3.weight"]
        assert torch.equal(weight, torch.where(mask, whole, layer.weight.detach()))
        assert mask.sum() == round(0.25 * mask.numel()) or dtype != torch.float32


@pytest.mark.parametrize("num_probes", [1, 3])
@pytest.mark.parametrize("of", ["rademacher", "gaussian"])
def test_probes_and_update_of_a_step_have_the_same_mask(of: str, num_probes: int) -> None:
    model = nn.Linear(9, 7, bias=False).double()
    slope = torch.randn(7, 9, dtype=torch.float64)
    seen: list[Tensor] = []

    def loss() -> Tensor:
        seen.append(model.weight + 0)
        return (seen[-1] * slope).sum()

    zo = engine(model, {"name": "sparse", "of": of}, num_probes=num_probes)
    for _ in range(5):
        before = model.weight.detach().clone()
        record = zo.step(loss)
        del seen[: len(seen) % 2]  # the first step measures one point twice
        z = [(plus - minus) / 2e-2 for plus, minus in zip(seen[::2], seen[1::2], strict=True)]
        moved = sum(-1e-2 * probe.coefficient * one for probe, one in zip(record.probes, z, strict=True))
        assert torch.allclose(model.weight - before, moved, atol=1e-6)
        assert torch.equal(model.weight != before, moved != 0)
        assert torch.equal(moved != 0, before.abs() <= zo.optimizer.thresholds["weight"])
        seen.clear()


@pytest.mark.parametrize("num_probes", [1, 2])
def test_steps_are_those_of_the_formula(num_probes: int) -> None:
    fast = tiny("llama")
    slow = copy.deepcopy(fast).eval()
    noise, beta, lr, decay = Sparse(0.3), torch.tensor(0.9), torch.tensor(-1e-2), torch.tensor(1 - 1e-2 * 0.1)
    zo = engine(fast, noise, rule="momentum", num_probes=num_probes, weight_decay=0.1)
    params = {slot.key: dict(slow.named_parameters())[name] for slot in zo.slots for name, p in
              fast.named_parameters() if p is slot.tensor}  # fmt: skip
    limits = {key: threshold(p.detach().flatten(), 0.3) for key, p in params.items()}
    m = {key: torch.zeros_like(p) for key, p in params.items()}
    for step in range(5):
        record = zo.step(closure("llama", fast, step))
        with torch.no_grad():
            for key, p in params.items():
                total = torch.zeros_like(p)
                for probe in record.probes:
                    z = Rademacher().z(probe.seed, key, 0, p.numel()).view(p.shape)
                    total += torch.tensor(probe.coefficient).float() * z
                mask = p.abs() <= limits[key]
                m[key] = m[key] * beta + torch.where(mask, total, 0.0)
                p.copy_(torch.where(mask, p * decay + m[key] * lr, p))
    assert same_bits(weights(fast), weights(slow))


def test_quantile_one_is_the_other_noise_and_gaussian_can_be_masked_too() -> None:
    models = tiny("llama"), tiny("llama")
    for model, noise in zip(models, ("gaussian", Sparse(1.0, "gaussian")), strict=True):
        run(engine(model, noise, **ALL), 4)
    assert same_bits(weights(models[0]), weights(models[1]))


def test_a_torch_optimizer_finds_zeros_in_the_gradient_of_large_weights() -> None:
    mine, theirs = tiny("mlp").double(), tiny("mlp").double()
    zo = engine(mine, lr=2.0**-7)
    other = ZeroOrder(theirs, noise="sparse", eps=1e-2, seed=5, optimizer=torch.optim.SGD(theirs.parameters(), 2.0**-7))
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in batch("mlp").items()}
    for _ in range(3):
        for one in (zo, other):
            one.step(lambda one=one: one.model(**inputs))
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-9)  # the rule rounds -lr * g to float32
    assert other.optimizer.state_dict()["zo"]["thresholds"] == zo.optimizer.thresholds


@pytest.mark.parametrize("relative", [True, False])
def test_of_quantisation_scales_the_small_ones_move(relative: bool) -> None:
    model = Quantised()
    zo = ZeroOrder(model, target=Int4Scales(relative), noise="sparse", lr=1e-3, eps=1e-2)
    before = [value.clone() for value in scales(model)]
    zo.step(quantised_loss(model))
    for old, new, slot in zip(before, scales(model), zo.slots, strict=True):
        moving = old <= zo.optimizer.thresholds[slot.key]
        assert torch.equal(new[~moving], old[~moving])
        assert (new[moving] != old[moving]).float().mean() > 0.5
        assert 0 < moving.sum() < moving.numel()


@pytest.mark.parametrize("noise", [Rademacher(), Gaussian()], ids=["rademacher", "gaussian"])
@pytest.mark.parametrize("num_probes", [1, 4])
def test_the_second_moment_counts_the_moving_elements(noise: Noise, num_probes: int) -> None:
    d, m, n = 12, 6, num_probes
    w = torch.linspace(-1.0, 2.0, d)
    gradient = torch.linspace(0.5, -1.0, d, dtype=torch.float64)
    masked = Sparse(0.5, NOISES.describe(noise))
    thresholds: dict[str, float] = {}

    def z(seed: int) -> Tensor:
        return masked.direction("w", w.shape, ((seed, 1.0),), Passes(thresholds=thresholds)).gradient(w).double()

    samples = torch.stack([torch.stack([z(derive_seed(0, sample, i)) for i in range(n)]) for sample in range(1500)])
    found = ((samples @ gradient).unsqueeze(2) * samples).mean(1)
    moving = w.abs() <= threshold(w, 0.5)
    assert moving.sum() == m
    assert torch.equal(found[:, ~moving], torch.zeros(1500, d - m, dtype=torch.float64))
    norm = gradient[moving].square().sum().item()
    squares = found.square().sum(1)
    error = squares.std().item() / math.sqrt(len(squares))
    assert abs(squares.mean().item() - (m + n + noise.kurtosis - 2) / n * norm) <= 5 * error + 1e-6 * norm
    for estimated, true in zip(found[:, moving].T, gradient[moving].tolist(), strict=True):
        assert abs(estimated.mean().item() - true) <= 5 * estimated.std().item() / math.sqrt(len(estimated))


def test_steps_go_downhill_along_the_small_weights_alone() -> None:
    model = nn.Linear(16, 1, bias=False)
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.weight[0, :8] = torch.linspace(2.0, 3.0, 8)  # these are large, and right
        target = x[:, :8] @ model.weight[0, :8]
        model.weight[0, 8:] = torch.linspace(-0.5, 0.5, 8)  # these should be 0
    zo = engine(model, Sparse(0.5), num_probes=4, lr=2e-2)
    losses = [float(zo.step(lambda: (model(x)[:, 0] - target).square().mean())) for _ in range(60)]
    assert losses[-1] < 0.2 * losses[0]
    assert torch.equal(model.weight[0, :8], torch.linspace(2.0, 3.0, 8))


# Settings


@pytest.mark.parametrize(
    ("noise", "words"),
    [
        ({"name": "sparse", "quantile": 0}, ["quantile=0 ", "above 0 and at most 1", "moves", "0.25"]),
        ({"name": "sparse", "quantile": 1.5}, ["quantile=1.5", "at most 1"]),
        ({"name": "sparse", "quantile": "0.2"}, ["quantile='0.2'"]),
        ({"name": "sparse", "quantile": True}, ["quantile=True"]),
        ({"name": "sparse", "quantile": math.nan}, ["quantile=nan"]),
        ({"name": "sparse", "of": "low_rank"}, ["of='low_rank'", "single elements", "of='rademacher'", "'gaussian'"]),
        ({"name": "sparse", "of": "sparse"}, ["of='sparse'", "of='rademacher'"]),
        ({"name": "sparse", "of": "sampled"}, ["of='sampled'", "'name': 'sampled', 'of': 'sparse'"]),
        ({"name": "sparse", "of": "normal"}, ["'normal'", "'rademacher'", "'gaussian'"]),
        ({"name": "sparse", "share": 0.2}, ["'sparse'", "share", "quantile, of"]),
    ],
    ids=str,
)
def test_what_cannot_work_says_what_to_write(noise: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        ZOConfig(noise=noise)
    assert [word for word in words if word not in str(caught.value)] == []
