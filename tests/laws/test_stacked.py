"""Law: all probes of a step in one forward measure what separate ones measure, or separate ones are run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import FAMILIES, batch, closure, tiny
from stacking import NOISE, engine, loss_of, made, run
from torch import Tensor, nn
from traces import left_as_found, same_bits, weights

from zo_core import LossError, Point, SeedLogWriter, ZeroOrder, replay
from zo_core.noise import Alternatives, stacked_factors, stacked_values
from zo_core.noise.direction import FLOAT_DTYPES

CPU = torch.device("cpu")
U = 2.0**-24  # unit roundoff of float32
STACKABLE = (*FAMILIES, "gpt2", "mlp", "functional_tied_head")


def both(zo: ZeroOrder, loss: Callable[[], Tensor]) -> tuple[list[float], list[float]]:
    """The losses of a step at the engine's points, in one forward and separately."""
    seeds = [zo.noise.seed(zo.seed, zo.step_count, i) for i in range(zo.num_probes)]
    points = zo.estimator.points(seeds, zo.eps)
    stacked = zo.oracle._stacked(points, loss)
    zo.oracle.stacking = False
    separate = zo.oracle.losses(points, loss)
    zo.oracle.stacking = True
    return [x.item() for x in stacked], [x.item() for x in separate]


# One forward is as good as many


@pytest.mark.parametrize("estimator", ["spsa", "fzoo"])
@pytest.mark.parametrize("name", STACKABLE)
def test_one_forward_measures_the_losses_of_separate_ones(name: str, estimator: str) -> None:
    # In float64 the two differ by the float32 in which the models and losses compute in part, and in nothing else.
    model = made(name, torch.float64)
    zo = engine(model, estimator=estimator, eps=1e-2)
    run(zo, name, 5)  # across the beginning of a window: updates wait, along the bases of the probes and older ones
    with left_as_found(model):
        stacked, separate = both(zo, loss_of(name, model, 7))
    for a, b, other in zip(stacked, separate, [*separate[1:], separate[0]], strict=True):
        assert abs(a - b) <= 4 * U * abs(b)
        assert abs(a - b) <= 1e-3 * abs(b - other)
    assert zo.oracle.stacking
    assert zo.oracle._compared


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "mlp"])
def test_runs_agree_up_to_rounding(name: str, dtype: torch.dtype) -> None:
    model, other = made(name, dtype), made(name, dtype)
    zo = engine(model)
    stacked, separate = run(zo, name, 4), run(engine(other, stack_probes=False), name, 4)
    unit = torch.finfo(dtype).eps / 2
    assert zo.oracle.stacking
    for a, b in zip(stacked, separate, strict=True):
        assert abs(a["loss"] - b["loss"]) <= 2 * unit * b["loss"]
        assert [p["seed"] for p in a["probes"]] == [p["seed"] for p in b["probes"]]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_small_tensors_have_the_bits_of_separate_probes(dtype: torch.dtype) -> None:
    theta = torch.linspace(-1, 1, 77, dtype=torch.float64).to(dtype)
    terms = tuple((NOISE.seed(0, 1, i), c) for i in range(3) for c in (1e-3, -1e-3, 0.0))
    stack = stacked_values(theta, Alternatives.of(NOISE.direction("b", theta.shape, terms)))
    for row, term in zip(stack, terms, strict=True):
        one = NOISE.direction("b", theta.shape, (term,))
        assert torch.equal(row, one.add_to(theta, out=torch.empty_like(theta)))


@pytest.mark.parametrize("known", [0, 1, 3])
def test_factors_share_the_bases_of_the_window(known: int) -> None:
    shape = torch.Size([6, 10])
    seeds = [NOISE.seed(0, 1, i) for i in range(3)]
    terms = tuple((seed, c) for seed in seeds for c in (0.5, -0.25))
    bases = tuple(seed >> 64 for seed in seeds[:known])
    base = (torch.randn(6, 2 * known), NOISE.rights(bases, "w", shape, CPU)) if known else None
    direction = replace(NOISE.direction("w", shape, terms), base=base, bases=bases)
    alternatives = Alternatives.of(direction)
    lefts, right = stacked_factors(alternatives, CPU)
    some = stacked_factors(alternatives, CPU, torch.tensor([4, 4, 0]))[0].clone()
    lefts = stacked_factors(alternatives, CPU)[0]
    assert len(right) == 2 * 3
    assert torch.equal(some, lefts[:, [4, 4, 0]])
    for left, term in zip(lefts, terms, strict=True):
        one = replace(direction, terms=(term,))
        a, b = (x.double() for x in one.factors(CPU))
        # Two float32 factors of the same column are summed before they are multiplied: one rounding more.
        assert torch.allclose(left.double() @ right.double(), a @ b, rtol=0, atol=8 * U * a.abs().sum(1).max().item())


def test_uneven_masks_are_averaged_copy_by_copy() -> None:
    model = made("llama", torch.float64)
    inputs = batch("llama")
    inputs["labels"][0, :6] = -100
    inputs["attention_mask"] = torch.ones(2, 8, dtype=torch.long)
    inputs["attention_mask"][1, 5:] = 0
    stacked, separate = both(engine(model), lambda: model(**inputs).loss)
    assert stacked == pytest.approx(separate, rel=4 * U)
    assert len(set(stacked)) == 6


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("name", STACKABLE)
def test_what_is_frozen_is_the_same_in_all_copies(name: str, which: int) -> None:
    model = made(name, torch.float64)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 == which)
    zo = engine(model, eps=1e-2)
    stacked, separate = both(zo, loss_of(name, model))
    assert stacked == pytest.approx(separate, rel=8 * U)
    assert len(set(stacked)) == 6


class Losses(nn.Module):
    """Ends in one of torch's losses."""

    def __init__(self, loss: Callable[[Tensor], Tensor]):
        super().__init__()
        self.head, self.loss = nn.Linear(8, 4), loss

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(self.head(x))


CLASSES, TARGETS = torch.tensor([0, 3, -100, 1, 1]), torch.linspace(0, 1, 20, dtype=torch.float64).view(5, 4)
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "weighted": lambda y: F.cross_entropy(y, CLASSES, weight=TARGETS[1], label_smoothing=0.1),
    "sum": lambda y: F.cross_entropy(y, CLASSES, reduction="sum") / 3,
    "none": lambda y: F.cross_entropy(y, CLASSES, reduction="none").square().mean(),
    "keywords": lambda y: F.nll_loss(input=y.log_softmax(-1), target=CLASSES),
    "mse": lambda y: F.mse_loss(y, TARGETS),
    "huber": lambda y: nn.HuberLoss()(y.flatten(), TARGETS.flatten()),
    "bce": lambda y: F.binary_cross_entropy_with_logits(y, TARGETS, TARGETS, reduction="mean"),
    "kl": lambda y: F.kl_div(y.log_softmax(-1), TARGETS, reduction="batchmean"),
    "own": lambda y: (y.logsumexp(-1) - y[:, 0]).mean() + 0.1 * y.square().sum(),
    "mixed": lambda y: F.mse_loss(y, TARGETS) + y.mean(0).var(),  # statistics of the batch do not mix the copies
}


@pytest.mark.parametrize("kind", LOSSES)
def test_every_loss_is_that_of_its_copy(kind: str) -> None:
    model = Losses(LOSSES[kind]).double()
    x = torch.randn(5, 8, dtype=torch.float64)
    zo = engine(model)
    stacked, separate = both(zo, lambda: model(x))
    assert stacked == pytest.approx(separate, rel=1e-12)
    assert len(set(stacked)) == 6


def test_half_precision_losses_are_computed_in_float32() -> None:
    model = Losses(lambda y: F.cross_entropy(y, torch.tensor([0, 3, 2, 1, 1]))).bfloat16()
    x = torch.randn(5, 8, dtype=torch.bfloat16)
    stacked, _ = both(engine(model), lambda: model(x))
    assert any(loss != torch.tensor(loss).bfloat16().item() for loss in stacked)


# No trace


def test_weights_modes_and_random_numbers_are_left_alone() -> None:
    model = made("mlp")
    zo = engine(model)
    loss = loss_of("mlp", model)
    zo.measure(loss)
    with left_as_found(model):
        zo.measure(loss)


@pytest.mark.parametrize("name", ["mlp", "llama"])
def test_with_dropout_all_copies_have_the_mask_of_separate_probes(name: str) -> None:
    if name == "llama":
        model = made(name, torch.float64)
        model.config.attention_dropout = 0.3
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.3
    else:
        model = made(name, torch.float64)
    zo = engine(model, dropout=True, eps=1e-2)
    loss = loss_of(name, model)
    torch.manual_seed(3)
    one = both(zo, loss)[0]
    torch.manual_seed(3)
    zo.oracle.stacking = False
    zo.measure(loss)
    after = torch.get_rng_state()
    other = [x.item() for x in zo._plan.sums]
    assert one == pytest.approx(other, rel=4 * U)
    torch.manual_seed(3)
    zo.oracle.stacking, zo.oracle._compared = True, True
    zo.measure(loss)
    assert torch.equal(torch.get_rng_state(), after)


class Oops(Exception):
    pass


def test_an_exception_passes_through_and_leaves_the_weights() -> None:
    model = made("mlp")
    zo = engine(model)
    run(zo, "mlp", 2)
    before = weights(model)

    def fails() -> Tensor:
        loss_of("mlp", model)()
        raise Oops

    with left_as_found(model), pytest.raises(Oops):
        zo.measure(fails)
    assert zo.oracle.stacking
    assert same_bits(weights(model), before)
    assert zo._plan is None


@pytest.mark.parametrize("returned", [None, torch.zeros(2), "loss"])
def test_what_is_no_loss_is_said_as_ever(returned: object) -> None:
    with pytest.raises(LossError):
        engine(made("mlp")).step(lambda: returned)


# Steps


@pytest.mark.parametrize("rule", ["sgd", "momentum"])
def test_the_seed_log_gives_the_weights_again(rule: str, tmp_path: Path) -> None:
    model, base = made("llama", torch.bfloat16), made("llama", torch.bfloat16)
    zo = engine(model, rule=rule)
    log = SeedLogWriter.attach(zo, tmp_path / "log")
    run(zo, "llama", 8)
    log.close()
    zo.close()
    replay(base, tmp_path / "log")
    assert same_bits(weights(model), weights(base))
    assert not same_bits(weights(model), weights(made("llama", torch.bfloat16)))


def test_a_resumed_run_continues_bit_for_bit() -> None:
    model, other = made("llama"), made("llama")
    zo, resumed = engine(model), engine(other)
    run(zo, "llama", 4)
    kept = copy.deepcopy({"model": model.state_dict(), "zo": zo.state_dict()})
    expected = run(zo, "llama", 4)
    other.load_state_dict(kept["model"])
    resumed.load_state_dict(kept["zo"])
    assert run(resumed, "llama", 4) == expected
    assert same_bits(weights(other), weights(model))


def test_micro_batches_of_a_step_are_measured_along_the_same_directions() -> None:
    model = made("llama", torch.float64)
    zo, other = engine(model), engine(model, stack_probes=False)
    losses = [loss_of("llama", model, index) for index in range(3)]
    sums = []
    for one in (zo, other):
        one.measure_all(losses[:2])
        one.measure(losses[2])
        sums.append([x.item() for x in one._plan.sums])
    assert sums[0] == pytest.approx(sums[1], rel=4 * U)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_updates_that_wait_are_not_lost_beside_eps_in_16_bit_factors(dtype: torch.dtype) -> None:
    """Their sum with eps U, rounded to 16 bits, would be eps U again: they are a thousand times smaller."""
    zo = engine(tiny("mlp", dtype=dtype), lr=1e-6)
    zo.step(closure("mlp", zo.model))
    (slot, *_) = (slot for slot in zo.slots if slot.tensor.ndim == 2)
    assert zo.updaters.windows.of
    waiting = zo.updaters.waiting(slot)
    assert waiting is not None
    left, right = waiting.factors(CPU)
    seed = zo.noise.seed(zo.seed, 1, 0)
    points = [Point(seed, zo.eps), Point(seed, -zo.eps)]
    alternatives = zo.directions.alternatives(zo.updaters.of[slot], slot, points)
    lefts, common = stacked_factors(alternatives, CPU, apart=True)
    moved = (lefts.to(dtype).double() @ common.double()).mean(0)
    # The parts along eps U cancel exactly, and each entry of the left factor was rounded once.
    bound = torch.finfo(dtype).eps / 2 * (left.abs().double() @ right.abs().double())
    if dtype == torch.float16:  # whose numbers near 0 are multiples of 2**-24
        bound += 2.0**-25 * len(right)
    assert bool(((moved - left.double() @ right.double()).abs() <= bound).all())
    assert bool(moved.any())
