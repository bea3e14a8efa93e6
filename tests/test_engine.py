"""Law: the engine turns losses into one update per step, however the losses come in and wherever it is stopped."""

from __future__ import annotations

import copy
import json
import logging
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import closure, tiny
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from traces import left_as_found, same_bits, weights

from zo_core import ESTIMATORS, NOISES, RULES, Fzoo, Momentum, Probe, StepRecord, ZeroOrder, ZOConfig, ZOOptimizer
from zo_core.targets import slot_keys

LR, EPS = 1e-2, 1e-2
OWN_RULES = [name for name in RULES if not RULES.resolve(name).wants_optimizer]


def run(zo: ZeroOrder, name: str, steps: int) -> list[StepRecord]:
    return [zo.step(closure(name, zo.model, index)) for index in range(steps)]


# Micro-batches


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_measuring_micro_batches_is_measuring_their_sum(estimator: str) -> None:
    model, other = tiny("mlp"), tiny("mlp")
    pieces, whole = (ZeroOrder(m, lr=LR, eps=EPS, estimator=estimator) for m in (model, other))
    for _ in range(3):
        means = [pieces.measure(closure("mlp", model, index)) for index in range(4)]
        assert all(mean.dtype == torch.float32 and mean.shape == () for mean in means)
        record = pieces.optimizer.step()
        # The engine sums in float64, in the order of the calls, so the same sum gives the same bits.
        expected = whole.step(lambda: sum(closure("mlp", other, index)().double() for index in range(4)))
        assert record.as_dict() == expected.as_dict()
    assert same_bits(weights(model), weights(other))


def test_all_micro_batches_of_a_step_see_the_same_directions_and_the_next_step_others() -> None:
    model = tiny("mlp")
    zo = ZeroOrder(model, lr=0.0)
    seen: list[Tensor] = []

    def loss() -> Tensor:
        seen.append(model.head.bias.detach() + 0)
        return closure("mlp", model)()

    for _ in range(2):
        zo.measure(loss)
        zo.measure(loss)
        zo.optimizer.step()
    first, again, second, _ = (torch.stack(seen[i : i + 2]) for i in range(0, 8, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_measuring_alone_changes_nothing_and_can_be_discarded() -> None:
    model = tiny("mlp")
    zo = ZeroOrder(model, lr=LR)
    with left_as_found(model):
        zo.measure(lambda: closure("mlp", model, 1)() * 100)
    zo.discard()
    found = zo.step(closure("mlp", model))
    other = tiny("mlp")
    assert found.as_dict() == ZeroOrder(other, lr=LR).step(closure("mlp", other)).as_dict()


def test_a_micro_batch_that_fails_takes_the_whole_step_with_it() -> None:
    model = tiny("mlp")
    zo = ZeroOrder(model, lr=LR)
    zo.measure(lambda: closure("mlp", model, 1)() * 100)
    with pytest.raises(ZeroDivisionError):
        zo.measure(lambda: 1 / 0)
    found = zo.step(closure("mlp", model))
    other = tiny("mlp")
    assert found.as_dict() == ZeroOrder(other, lr=LR).step(closure("mlp", other)).as_dict()


def test_the_optimizer_measures_a_closure_like_torch_optimizers_do() -> None:
    model, other = tiny("mlp"), tiny("mlp")
    zo, expected = ZeroOrder(model, lr=LR), ZeroOrder(other, lr=LR)
    record = zo.optimizer.step(closure("mlp", model))
    assert record.as_dict() == expected.step(closure("mlp", other)).as_dict()
    assert same_bits(weights(model), weights(other))


# The record


def test_a_record_is_a_float() -> None:
    record = ZeroOrder(model := tiny("mlp"), lr=LR).step(closure("mlp", model))
    assert isinstance(record, float)
    assert f"{record:.3f}" == f"{record.loss:.3f}"
    assert sum([record, record]) == 2 * record.loss
    assert max(record, 0.0) == torch.tensor(record, dtype=torch.float64).item() == record.loss
    assert json.loads(json.dumps(record)) == record.loss
    assert record == record.loss
    assert hash(record) == hash(record.loss)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda record: pickle.loads(pickle.dumps(record))])
def test_a_record_survives_copying_and_pickling_whole(duplicate: Callable[[StepRecord], StepRecord]) -> None:
    record = ZeroOrder(model := tiny("mlp"), num_probes=2).step(closure("mlp", model))
    twin = duplicate(record)
    assert type(twin) is StepRecord
    assert float(twin) == float(record)
    assert twin.as_dict() == record.as_dict()
    assert twin.probes == record.probes


def test_a_record_says_what_was_done() -> None:
    model = tiny("mlp")
    zo = ZeroOrder(model, lr=LR, eps=EPS, num_probes=3, seed=5)
    seen: list[float] = []
    loss = closure("mlp", model)

    def watched() -> Tensor:
        value = loss()
        seen.append(value.item())
        return value

    zo.step(loss)
    record = zo.step(watched)
    grads = [(plus - minus) / (2 * EPS) for plus, minus in zip(seen[::2], seen[1::2], strict=True)]
    assert record.loss == math.fsum(seen) / 6
    assert record.projected_grad == math.fsum(grads) / 3
    assert [probe.coefficient for probe in record.probes] == [g / 3 for g in grads]
    assert len({probe.seed for probe in record.probes}) == 3
    assert (record.seed, record.step, record.lr) == (record.probes[0].seed, 1, LR)
    assert (record.clipped, record.skipped) == (0, None)


def test_listeners_hear_of_every_step() -> None:
    model = tiny("mlp")
    zo = ZeroOrder(model)
    heard: list[StepRecord] = []
    zo.listeners.append(heard.append)
    records = [*run(zo, "mlp", 2), zo.step(lambda: float("nan"))]
    assert all(a is b for a, b in zip(heard, records, strict=True))


def test_the_coefficient_is_clipped_and_the_projected_gradient_told_as_measured() -> None:
    model = nn.Linear(3, 1, bias=False)
    x = torch.tensor([[100.0, 10.0, 1.0]])
    zo = ZeroOrder(model, lr=1.0, clip=5.0, num_probes=2)
    before = model.weight.detach().clone()
    record = zo.step(lambda: model(x).sum())
    assert record.clipped == 2
    assert [abs(probe.coefficient) for probe in record.probes] == [2.5, 2.5]  # the mean over two directions
    assert abs(record.projected_grad) > 5
    z = [NOISES.resolve("rademacher").z(probe.seed, "weight", 0, 3).view(1, 3) for probe in record.probes]
    moved = sum(-probe.coefficient * direction for probe, direction in zip(record.probes, z, strict=True))
    assert torch.equal(model.weight.detach(), before + moved)
    assert ZeroOrder(model, clip=1e6).step(lambda: model(x).sum()).clipped == 0


# Steps that are skipped


@pytest.mark.parametrize("rule", OWN_RULES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("probe", [0, 1])
def test_a_loss_that_is_not_finite_skips_the_step(
    rule: str, bad: float, probe: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny("mlp")
    zo = ZeroOrder(model, lr=LR, rule=rule)
    calls: list[int] = []

    def loss() -> Tensor:
        calls.append(1)
        # The very first probe is tried a second time, with copies of all weights at once.
        return closure("mlp", model)() * (bad if len(calls) in ((1, 2), (2,))[probe] else 1.0)

    with left_as_found(model), caplog.at_level(logging.WARNING):
        record = zo.step(loss)
    assert record.skipped is not None
    assert "not finite" in record.skipped
    assert math.isnan(record)
    assert record.probes == ()
    assert any("step 0 skipped, weights untouched" in message for message in caplog.messages)
    assert not zo.optimizer.state
    following = zo.step(closure("mlp", model))
    assert following.skipped is None
    assert (following.step, zo.step_count) == (1, 2)
    assert following.seed != record.seed


@pytest.mark.parametrize("rule", OWN_RULES)
def test_a_projected_gradient_beyond_float32_skips_the_step(rule: str) -> None:
    model = nn.Linear(2, 1, bias=False)
    zo = ZeroOrder(model, lr=1e-3, eps=1e-3, rule=rule)
    with left_as_found(model):
        record = zo.step(lambda: model.weight.double().sum() * 1e40)
    assert record.skipped is not None
    assert "float32" in record.skipped
    assert zo.step_count == 1
    assert zo.step(lambda: model.weight.sum()).skipped is None


@pytest.mark.parametrize("rule", OWN_RULES)
@pytest.mark.parametrize("noise", list(NOISES))
def test_two_equal_losses_move_nothing_by_the_estimate(rule: str, noise: str) -> None:
    model = tiny("mlp")
    zo = ZeroOrder(model, lr=LR, rule=rule, noise=noise)
    with left_as_found(model):
        record = zo.step(lambda: 1.0)
    assert record.projected_grad == 0.0


# Checkpoints


@pytest.mark.parametrize("rule", OWN_RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(rule: str, dtype: torch.dtype) -> None:
    def start(model: nn.Module, seed: int) -> tuple[ZeroOrder, LambdaLR]:
        zo = ZeroOrder(model, lr=LR, rule=rule, seed=seed, weight_decay=0.1)
        return zo, LambdaLR(zo.optimizer, lambda step: 1 / (1 + step))

    def go(zo: ZeroOrder, schedule: LambdaLR, indices: range) -> list[dict[str, Any]]:
        records = []
        for index in indices:
            records.append(zo.step(closure("mlp", zo.model, index)).as_dict())
            schedule.step()
        return records

    model = tiny("mlp", dtype=dtype)
    zo, schedule = start(model, seed=3)
    go(zo, schedule, range(3))
    checkpoint = copy.deepcopy((model.state_dict(), zo.state_dict(), schedule.state_dict()))
    rest = go(zo, schedule, range(3, 6))

    fresh = tiny("mlp", dtype=dtype)
    again, its_schedule = start(fresh, seed=99)
    again.measure(closure("mlp", fresh))  # loading forgets what was under way
    fresh.load_state_dict(checkpoint[0])
    again.load_state_dict(pickle.loads(pickle.dumps(checkpoint[1])))
    its_schedule.load_state_dict(checkpoint[2])
    assert go(again, its_schedule, range(3, 6)) == rest
    assert same_bits(weights(fresh), weights(model))


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adagrad])
def test_a_run_with_a_torch_optimizer_resumes_too(optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    model, fresh = tiny("mlp"), tiny("mlp")
    zo = ZeroOrder(model, optimizer=optimizer(model.parameters(), lr=LR))
    run(zo, "mlp", 3)
    state = copy.deepcopy((model.state_dict(), zo.state_dict()))
    rest = run(zo, "mlp", 3)
    again = ZeroOrder(fresh, optimizer=optimizer(fresh.parameters(), lr=1.0))
    fresh.load_state_dict(state[0])
    again.load_state_dict(state[1])
    assert [r.as_dict() for r in run(again, "mlp", 3)] == [r.as_dict() for r in rest]
    assert same_bits(weights(fresh), weights(model))


def test_a_checkpoint_is_plain_enough_for_safe_loading(tmp_path: Any) -> None:
    model = tiny("mlp")
    zo = ZeroOrder(model, lr=LR, rule="momentum")
    run(zo, "mlp", 2)
    torch.save(zo.state_dict(), tmp_path / "zo.pt")
    other = ZeroOrder(tiny("mlp"), rule="momentum")
    other.load_state_dict(torch.load(tmp_path / "zo.pt", weights_only=True))
    assert other.step_count == 2
    assert other.optimizer.param_groups[0]["lr"] == LR


# Groups


def grouped(model: nn.Module) -> ZOOptimizer:
    return ZOOptimizer(
        [
            {"params": model.inner.parameters(), "lr": 0.03},
            {"params": model.head.parameters(), "lr": 0.01, "eps": 4 * EPS, "weight_decay": 0.5},
        ],
        eps=EPS,
    )


@pytest.mark.parametrize("eps", [None, EPS / 8])
def test_groups_have_their_own_learning_rate_eps_and_weight_decay(eps: float | None) -> None:
    """Powers of two between the eps, so that the scaled coefficients are exact."""
    model = tiny("mlp")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen: list[dict[str, Tensor]] = []
    losses: list[float] = []
    handles = [
        module.register_forward_hook(
            lambda m, args, output, path=path: seen[-1].update(
                {f"{path}.{name}": p.detach().clone() for name, p in m.named_parameters(recurse=False)}
            )
        )
        for path, module in model.named_modules()
    ]

    def loss() -> Tensor:
        seen.append({})
        value = closure("mlp", model)()
        losses.append(value.item())
        return value

    record = ZeroOrder(model, optimizer=grouped(model), eps=eps).step(loss)
    for handle in handles:
        handle.remove()

    def z(name: str) -> Tensor:
        values = NOISES.resolve("rademacher").z(record.seed, name, 0, start[name].numel())
        return values.view(start[name].shape)

    f32 = lambda value: torch.tensor(value, dtype=torch.float32)  # noqa: E731
    for name, theta in start.items():
        group_eps, lr, decay = (4 * EPS, 0.01, 0.5) if name.startswith("head") else (EPS, 0.03, 0.0)
        for side, perturbed in zip((1, -1), seen, strict=True):
            assert torch.equal(perturbed[name], theta + f32(side * group_eps) * z(name))
        g = (losses[0] - losses[1]) / (2 * group_eps)  # the two-sided difference of this group's own eps
        expected = f32(1 - lr * decay) * theta + f32(-lr * g) * z(name)
        assert torch.equal(model.get_parameter(name).detach(), expected)
    assert record.lr == 0.03


def test_what_the_optimizer_does_not_hold_stays() -> None:
    model = tiny("mlp")
    before = weights(model)
    zo = ZeroOrder(model, optimizer=ZOOptimizer(model.head.parameters(), lr=LR))
    run(zo, "mlp", 3)
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}


def test_schedulers_move_the_groups_of_either_kind_of_optimizer() -> None:
    for make in (grouped, lambda model: torch.optim.SGD(model.parameters(), lr=LR)):
        model = tiny("mlp")
        zo = ZeroOrder(model, optimizer=make(model))
        first = zo.optimizer.param_groups[0]["lr"]
        schedule = LambdaLR(zo.optimizer, lambda step: 0.5**step)
        lrs = []
        for _ in range(3):
            lrs.append(zo.step(closure("mlp", model)).lr)
            schedule.step()
        assert lrs == [first, first / 2, first / 4]


def test_the_mean_over_more_probes_is_the_mean_of_their_updates() -> None:
    model = nn.Linear(4, 1, bias=False)
    start = model.weight.detach().clone()
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    record = ZeroOrder(model, lr=1.0, num_probes=5).step(lambda: model(x).sum())
    z = torch.stack([NOISES.resolve("rademacher").z(probe.seed, "weight", 0, 4) for probe in record.probes])
    # x . z for each direction, as differences of float32 losses show it: two roundings of a loss below 16, so 2**-20
    # over 2 eps, then the same for lr * g * z in float32.
    slopes = z @ x[0]
    found = torch.tensor([5 * probe.coefficient for probe in record.probes])
    assert (found - slopes).abs().max() <= 2 * 2.0**-20 / 2e-3
    assert (start - model.weight.detach() - (found.unsqueeze(1) * z).mean(0)).abs().max() <= 8 * 2.0**-20


# Slot keys


class Holder(nn.Module):
    def __init__(self, attribute: str, model: nn.Module):
        super().__init__()
        setattr(self, attribute, model)

    def forward(self, **inputs: Tensor) -> Tensor:
        return next(self.children())(**inputs)


@pytest.mark.parametrize("path", ["model", "module", "_orig_mod", "model.module", "_orig_mod.module", "module.module"])
@pytest.mark.parametrize("name", ["mlp", "llama", "t5"])
def test_a_wrapped_model_takes_the_same_steps(name: str, path: str) -> None:
    model, inner = tiny(name), tiny(name)
    wrapped = inner
    for attribute in reversed(path.split(".")):
        wrapped = Holder(attribute, wrapped)
    bare, other = ZeroOrder(model, lr=LR), ZeroOrder(wrapped, lr=LR)
    assert [slot.key for slot in other.slots] == [slot.key for slot in bare.slots]
    for _ in range(2):
        assert bare.step(closure(name, model)).as_dict() == other.step(closure(name, wrapped)).as_dict()
    assert same_bits(weights(model), weights(inner))


def test_wrappers_inside_a_model_do_not_show_either() -> None:
    bare = ["encoder.layer.weight", "encoder.layer.bias", "head.weight"]
    for layer in ("module.layer", "layer.module", "_orig_mod.layer._orig_mod.module", "module.module.layer"):
        assert slot_keys([name.replace("layer", layer) for name in bare]) == bare


@pytest.mark.parametrize(
    "names",
    [
        ["weight"],
        ["module"],
        ["a.module", "b.module"],
        ["a.weight", "a.module.weight"],
        ["a.module.weight", "a.weight", "a._orig_mod.weight", "module.a.weight"],
        ["a", "a.b"],
        ["model.a.w", "model.b.w", "w"],
    ],
)
def test_no_two_slots_share_a_key(names: list[str]) -> None:
    """Two tensors with one key would get the same z, and the estimate of both would be wrong."""
    for prefix in ("", "module.", "_orig_mod.module.", "lightning.model."):
        keys = slot_keys([prefix + name for name in names])
        assert len(set(keys)) == len(names)
        assert keys == slot_keys(names)
        assert all(keys)


def test_a_tensor_that_two_modules_hold_is_one_slot() -> None:
    for name in ("llama", "opt", "bert", "t5"):
        tied, untied = (ZeroOrder(tiny(name, tied)).slots for tied in (True, False))
        assert len(tied) < len(untied)
        assert max(len(slot.modules) for slot in tied) >= 2


def test_two_parameters_that_share_memory_are_one_slot() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.data)
    zo = ZeroOrder(model, lr=LR)
    assert [len(slot.tensors) for slot in zo.slots] == [2]
    other = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    other[1].weight = other[0].weight
    other[0].weight.data.copy_(model[0].weight.data)
    x = torch.ones(1, 4)
    twin = ZeroOrder(other, lr=LR)
    for _ in range(2):
        found, expected = zo.step(lambda: model(x).sum()), twin.step(lambda: other(x).sum())
        assert found.projected_grad == expected.projected_grad
        assert torch.equal(model[0].weight, other[0].weight)
        assert model[0].weight.data_ptr() == model[1].weight.data_ptr()


@pytest.mark.parametrize("held", [0, 1])
@pytest.mark.parametrize(("make", "rule"), [(ZOOptimizer, "momentum"), (torch.optim.AdamW, "torch")])
def test_an_optimizer_may_hold_either_of_two_parameters_that_share_memory(
    held: int, make: Callable[..., torch.optim.Optimizer], rule: str
) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.data)
    before = model[0].weight.detach().clone()
    zo = ZeroOrder(model, optimizer=make([model[held].weight], lr=LR), rule=rule)
    zo.step(lambda: model(torch.ones(1, 4)).sum())
    assert not torch.equal(model[0].weight, before)
    assert list(zo.optimizer.state_dict()["state"]) == [0]


# Configuration


def test_defaults_are_those_of_the_estimator() -> None:
    for name in ESTIMATORS:
        zo = ZeroOrder(tiny("mlp"), estimator=name)
        estimator = ESTIMATORS.resolve(name)
        group = zo.optimizer.param_groups[0]
        assert (group["lr"], group["eps"]) == (estimator.default_lr, estimator.default_eps)
        assert zo.num_probes == estimator.default_num_probes


def test_overrides_go_before_the_config() -> None:
    config = ZOConfig(lr=1.0, eps=0.5, seed=3)
    zo = ZeroOrder(tiny("mlp"), config, eps=0.25)
    assert (zo.optimizer.param_groups[0]["lr"], zo.eps, zo.seed) == (1.0, 0.25, 3)
    assert config.eps == 0.5


@pytest.mark.parametrize(
    "config",
    [
        ZOConfig(),
        ZOConfig(lr=1e-4, eps=0.1, num_probes=3, weight_decay=0.1, clip=2.0, seed=7, dropout=True),
        ZOConfig(stochastic_rounding=False, backend="eager", noise="gaussian"),
        *(ZOConfig(estimator=name) for name in ESTIMATORS),
        *(ZOConfig(rule=name) for name in RULES),
        *(ZOConfig(noise=name) for name in NOISES),
        ZOConfig(rule={"name": "momentum", "beta": 0.5}),
        ZOConfig(rule=Momentum(0.25), estimator=Fzoo()),
    ],
    ids=lambda config: str({k: v for k, v in config.to_dict().items() if v != ZOConfig().to_dict()[k]}),
)
def test_a_configuration_goes_through_json_and_back(config: ZOConfig) -> None:
    twin = ZOConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert twin.to_dict() == config.to_dict()
    assert twin.resolve(has_optimizer=twin.rule == "torch") == config.resolve(has_optimizer=twin.rule == "torch")
    assert ZOConfig.from_dict({}) == ZOConfig()


# Copies


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda zo: pickle.loads(pickle.dumps(zo))])
@pytest.mark.parametrize("foreign", [False, True], ids=["own", "torch"])
def test_an_optimizer_can_be_copied_and_pickled_without_its_engine(
    duplicate: Callable[[ZOOptimizer], ZOOptimizer], foreign: bool
) -> None:
    model = tiny("mlp")
    if foreign:
        zo = ZeroOrder(model, optimizer=torch.optim.AdamW(model.parameters(), lr=LR))
    else:
        zo = ZeroOrder(model, lr=LR, rule="momentum")
    run(zo, "mlp", 2)
    twin = duplicate(zo.optimizer)
    assert type(twin) is type(zo.optimizer)
    assert twin.engine is None
    assert zo.optimizer.engine is zo
    found, expected = twin.state_dict(), zo.optimizer.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    for index, state in expected["state"].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(found["state"][index][key]), torch.as_tensor(value))
    twin.param_groups[0]["lr"] = 0.5
    assert twin.state_dict()["param_groups"][0]["lr"] == 0.5
    assert zo.optimizer.param_groups[0]["lr"] == LR


def test_a_probe_and_a_record_are_plain_values() -> None:
    record = ZeroOrder(model := tiny("mlp")).step(closure("mlp", model))
    assert record.probes == (Probe(record.seed, record.projected_grad),)
    assert json.dumps(record.as_dict())
