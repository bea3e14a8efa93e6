"""Law: each rule moves a slot by its formula, with the state the formula needs and no other."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import closure, tiny
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from traces import same_bits, weights

from zo_core import NOISES, RULES, StepRecord, UpdateRule, ZeroOrder
from zo_core.noise import Direction
from zo_core.noise.direction import CPU_CHUNK
from zo_core.noise.rounding import DROPPED_BITS, rounding_key, stochastic_round

SHAPE = (37, 5)
LR = 0.05


def f32(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


@dataclasses.dataclass
class Naive:
    """A rule as its formula, for whole tensors in float32 or float64. ``m`` is its memory between steps."""

    step: Callable[[Naive, Tensor, Direction, float, float], Tensor]
    m: Tensor | None = None


def values(direction: Direction, shape: torch.Size, factor: float = 1.0) -> Tensor:
    """The sum of ``round(factor * c * z)`` over the terms."""
    total = torch.zeros(shape)
    for seed, c in direction.terms:
        total = total + f32(factor * c) * direction.noise.z(seed, direction.slot, 0, shape.numel()).view(shape)
    return total


def naive_sgd(self: Naive, theta: Tensor, g: Direction, lr: float, weight_decay: float) -> Tensor:
    return theta * f32(1 - lr * weight_decay) + values(g, theta.shape, -lr)


def naive_momentum(self: Naive, theta: Tensor, g: Direction, lr: float, weight_decay: float) -> Tensor:
    self.m = (torch.zeros_like(theta) if self.m is None else self.m) * f32(0.9) + values(g, theta.shape)
    return theta * f32(1 - lr * weight_decay) + self.m * f32(-lr)


def naive_sign(self: Naive, theta: Tensor, g: Direction, lr: float, weight_decay: float) -> Tensor:
    return theta * f32(1 - lr * weight_decay) + values(g, theta.shape).sign() * f32(-lr)


#: One formula for each rule that is its own optimizer; a new rule needs a line here.
FORMULAS = {"sgd": naive_sgd, "momentum": naive_momentum, "sign": naive_sign}
OWN_RULES = [name for name in RULES if not RULES.resolve(name).wants_optimizer]
EVERY_RULE = pytest.mark.parametrize("rule", [RULES.resolve(name) for name in OWN_RULES], ids=OWN_RULES)
EVERY_NOISE = pytest.mark.parametrize("noise", ["rademacher", "gaussian"])


def directions(noise: str, rounding: bool = False) -> Iterator[Direction]:
    """Four steps of two probes each, from large to far below one unit in the last place."""
    for step, size in enumerate((1.0, -0.3, 1e-4, 1e-6)):
        terms = ((2 * step, size), (2 * step + 1, -0.7 * size))
        yield Direction(NOISES.resolve(noise), "w", terms, 2 * step if rounding else None)


def random_weights(dtype: torch.dtype) -> Tensor:
    return torch.randn(SHAPE, dtype=torch.float64).to(dtype)


def test_every_rule_has_a_formula() -> None:
    assert set(FORMULAS) == set(OWN_RULES)


@EVERY_RULE
@EVERY_NOISE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_rule_is_its_formula(rule: UpdateRule, noise: str, dtype: torch.dtype, weight_decay: float) -> None:
    theta = random_weights(dtype)
    expected, naive, state = theta.clone(), Naive(FORMULAS[rule.name]), {}
    for direction in directions(noise):
        rule.update(theta, state, direction, LR, weight_decay)
        expected = naive.step(naive, expected, direction, LR, weight_decay)
        assert torch.equal(theta, expected)
    assert [value.dtype for value in state.values()] == ([] if naive.m is None else [dtype])
    assert all(torch.equal(value, naive.m) for value in state.values())


@EVERY_RULE
def test_sixteen_bit_weights_are_moved_in_float32_and_rounded_once(rule: UpdateRule) -> None:
    theta = random_weights(torch.bfloat16)
    naive, state = Naive(FORMULAS[rule.name]), {}
    for direction in directions("rademacher"):
        expected = naive.step(naive, theta.float(), direction, LR, 0.1).to(torch.bfloat16)
        rule.update(theta, state, direction, LR, 0.1)
        assert torch.equal(theta, expected)
    assert all(value.dtype == torch.float32 for value in state.values())


@EVERY_RULE
def test_chunks_do_not_show_in_weights_or_state(rule: UpdateRule) -> None:
    theta = torch.randn(2 * CPU_CHUNK + 77)
    expected, naive, state = theta.clone(), Naive(FORMULAS[rule.name]), {}
    for direction in directions("rademacher"):
        rule.update(theta, state, direction, LR, 0.1)
        expected = naive.step(naive, expected, direction, LR, 0.1)
    assert torch.equal(theta, expected)


@EVERY_RULE
@pytest.mark.parametrize("dtype", list(DROPPED_BITS), ids=str)
def test_stochastic_rounding_follows_the_index_through_the_chunks(rule: UpdateRule, dtype: torch.dtype) -> None:
    theta = torch.randn(2 * CPU_CHUNK + 77).to(dtype)
    direction = next(directions("rademacher", rounding=True))
    naive = Naive(FORMULAS[rule.name])
    exact = naive.step(naive, theta.float(), direction, LR, 0.1)
    key = rounding_key(0, "w")
    expected = [
        stochastic_round(piece.clone(), dtype, key, 1024 * index) for index, piece in enumerate(exact.split(1024))
    ]
    rule.update(theta, {}, direction, LR, 0.1)
    assert torch.equal(theta.float(), torch.cat(expected))


@EVERY_RULE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_strides_do_not_matter_to_a_rule(rule: UpdateRule, dtype: torch.dtype) -> None:
    plain = random_weights(dtype)
    odd = plain.t().contiguous().t()
    assert not odd.is_contiguous()
    state, odd_state = {}, {}
    for direction in directions("gaussian", rounding=True):
        rule.update(plain, state, direction, LR, 0.1)
        rule.update(odd, odd_state, direction, LR, 0.1)
    assert torch.equal(plain, odd)
    assert odd.stride() == (1, SHAPE[0])


@EVERY_RULE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_learning_rate_of_zero_leaves_the_weights_untouched(
    rule: UpdateRule, dtype: torch.dtype, weight_decay: float
) -> None:
    theta = random_weights(dtype)
    before, state = theta.clone(), {}
    for direction in directions("rademacher", rounding=True):
        rule.update(theta, state, direction, 0.0, weight_decay)
    assert torch.equal(theta, before)


@EVERY_RULE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_updates_of_sixteen_bit_weights_arrive_on_average(rule: UpdateRule, dtype: torch.dtype) -> None:
    size, move = 1 << 18, 1e-6
    theta = torch.full((size,), 0.02).to(dtype)
    before = theta.double()
    # Every rule here moves each element by lr * sign(z) at its first step along one probe with coefficient 1.
    direction = Direction(NOISES.resolve("rademacher"), "w", ((5, 1.0),), rounding_seed=5)
    nearest, state = theta.clone(), {}
    rule.update(theta, state, direction, move, 0.0)
    z = NOISES.resolve("rademacher").z(5, "w", 0, size)
    arrived = ((theta.double() - before) * z).mean().item()
    ulp = 2.0**-13 if dtype == torch.bfloat16 else 2.0**-16  # of 0.02, between 2**-6 and 2**-5
    # An element moves by one ulp with the chance move / ulp, else not at all.
    assert abs(arrived + move) <= 5 * ulp * (move / ulp / size) ** 0.5
    rule.update(nearest, {}, dataclasses.replace(direction, rounding_seed=None), move, 0.0)
    assert torch.equal(nearest.double(), before)  # while rounding to nearest loses the whole update


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_momentum_is_float32_and_survives_a_checkpoint_as_it_is(dtype: torch.dtype) -> None:
    model = tiny("mlp", dtype=dtype)
    zo = ZeroOrder(model, lr=1e-2, rule="momentum")
    for _ in range(3):
        zo.step(closure("mlp", model))
    saved = copy.deepcopy(zo.optimizer.state_dict())
    other = ZeroOrder(copy.deepcopy(model), lr=1.0, rule="momentum")
    other.optimizer.load_state_dict(saved)
    for slot, twin in zip(zo.slots, other.slots, strict=True):
        momentum, loaded = (z.optimizer.state[s.tensor]["momentum"] for z, s in ((zo, slot), (other, twin)))
        assert loaded.dtype == momentum.dtype == torch.float32
        assert torch.equal(loaded, momentum)
        assert momentum.any()
        assert loaded.data_ptr() != momentum.data_ptr()
    assert other.optimizer.param_groups[0]["lr"] == 1e-2


def test_rules_without_state_keep_none() -> None:
    model = tiny("mlp")
    for rule in ("sgd", "sign"):
        zo = ZeroOrder(model, rule=rule)
        zo.step(closure("mlp", model))
        assert not zo.optimizer.state


# The rule that hands the estimate to a torch optimizer


class NormalisedSgd(torch.optim.SGD):
    """Looks at all gradients together: the step has the length of the learning rate."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        for gradient in gradients:
            gradient.div_(norm)
        super().step()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda params: torch.optim.Adam(params, lr=1e-3, amsgrad=True),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-3),
    "adamw-foreach": lambda params: torch.optim.AdamW(params, lr=1e-3, foreach=True),
    "adamw-fused": lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=1e-3, centered=True, momentum=0.5),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=1e-2),
    "adamax": lambda params: torch.optim.Adamax(params, lr=1e-3),
    "nadam": lambda params: torch.optim.NAdam(params, lr=1e-3),
    "normalised": lambda params: NormalisedSgd(params, lr=0.1),
}
EVERY_OPTIMIZER = pytest.mark.parametrize("name", list(OPTIMIZERS))


def grouped(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups with different learning rates."""
    return [{"params": list(model.inner.parameters())}, {"params": list(model.head.parameters()), "lr": 3e-3}]


def give_gradients(model: nn.Module, record: StepRecord) -> None:
    for slot in ZeroOrder(model).slots:
        terms = tuple((probe.seed, probe.coefficient) for probe in record.probes)
        direction = Direction(NOISES.resolve("rademacher"), slot.key, terms)
        slot.tensor.grad = values(direction, slot.tensor.shape).to(slot.tensor.dtype)


@EVERY_OPTIMIZER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_torch_optimizer_steps_as_if_given_all_gradients_at_once(name: str, dtype: torch.dtype) -> None:
    model, other = tiny("mlp", dtype=dtype), tiny("mlp", dtype=dtype)
    optimizer, expected = (OPTIMIZERS[name](grouped(m)) for m in (model, other))
    zo = ZeroOrder(model, optimizer=optimizer, num_probes=2)
    for _ in range(4):
        record = zo.step(closure("mlp", model))
        give_gradients(other, record)
        expected.step()
        assert same_bits(weights(model), weights(other))
    assert all(p.grad is None for p in model.parameters())
    found, wanted = optimizer.state_dict(), expected.state_dict()
    assert found["param_groups"] == wanted["param_groups"]
    for index, state in wanted["state"].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(found["state"][index][key]), torch.as_tensor(value))


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop"])
def test_separable_optimizers_hold_one_gradient_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("mlp")
    optimizer = OPTIMIZERS[name](model.parameters())
    alive = []
    step = type(optimizer).step

    def counting(self: torch.optim.Optimizer, *args: Any) -> Any:
        alive.append(sum(p.grad is not None for p in model.parameters()))
        return step(self, *args)

    monkeypatch.setattr(type(optimizer), "step", counting)
    ZeroOrder(model, optimizer=optimizer).step(closure("mlp", model))
    assert alive == [1] * len(list(model.parameters()))


def test_an_exception_in_a_torch_optimizer_leaves_its_groups_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("mlp")
    optimizer = torch.optim.SGD(grouped(model), lr=0.1)
    before = [list(map(id, group["params"])) for group in optimizer.param_groups]
    zo = ZeroOrder(model, optimizer=optimizer)

    def fails(self: torch.optim.Optimizer) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(torch.optim.SGD, "step", fails)
    with pytest.raises(ZeroDivisionError):
        zo.step(closure("mlp", model))
    assert [list(map(id, group["params"])) for group in optimizer.param_groups] == before
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["sgd", "adamw", "adagrad"])
def test_step_hooks_fire_once_per_step_with_all_parameters(name: str) -> None:
    model = tiny("mlp")
    optimizer = OPTIMIZERS[name](model.parameters())
    zo = ZeroOrder(model, optimizer=optimizer)
    fired: list[tuple[str, int, int]] = []

    def note(kind: str) -> Callable[..., None]:
        def hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            params = [p for group in optimizer.param_groups for p in group["params"]]
            fired.append((kind, len(params), sum(p.grad is not None for p in params)))

        return hook

    optimizer.register_step_pre_hook(note("inner pre"))
    optimizer.register_step_post_hook(note("inner post"))
    zo.optimizer.register_step_pre_hook(note("outer pre"))
    zo.optimizer.register_step_post_hook(note("outer post"))
    zo.step(closure("mlp", model))
    count = len(list(model.parameters()))
    assert fired == [
        ("outer pre", count, 0),
        ("inner pre", count, count),
        ("inner post", count, count),
        ("outer post", count, 0),
    ]


def test_hooks_on_all_optimizers_fire_once_per_step_of_each() -> None:
    model = tiny("mlp")
    optimizer = torch.optim.AdamW(model.parameters())
    zo = ZeroOrder(model, optimizer=optimizer)
    fired: list[object] = []
    handles = [
        register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: fired.append(optimizer)),
        register_optimizer_step_post_hook(lambda optimizer, args, kwargs: fired.append(optimizer)),
    ]
    try:
        zo.step(closure("mlp", model))
    finally:
        for handle in handles:
            handle.remove()
    assert fired == [zo.optimizer, optimizer, optimizer, zo.optimizer]
