"""Laws: backpropagation through some weights is torch's own, and the others move as they do without it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zo_core import ConfigError, LossError, QueryError, SeedLogWriter, StateError, ZeroOrder, ZOConfig, ZOOptimizer

Closure = Callable[[], Tensor]
HEAD = ("4",)


def make(head: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), head or nn.Linear(12, 3))


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 6, generator=generator), torch.randint(0, 3, (16,), generator=generator)) for _ in range(count)
    ]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Closure:
    return lambda: F.cross_entropy(model(batch[0]), batch[1])


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def trained(model: nn.Module, steps: int = 4, **settings: Any) -> ZeroOrder:
    zo = ZeroOrder(model, **{"lr": 1e-3, **settings})
    for batch in batches(steps):
        zo.step(loss_of(model, batch))
    return zo


def test_without_names_nothing_changes() -> None:
    one, other = make(), make()
    trained(one)
    assert trained(other, backprop=()).backprop is None
    assert same(one, other)


@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_named_weights_move_as_under_torch_alone(max_norm: float | None) -> None:
    model, plain = make(), make()
    zo = ZeroOrder(model, lr=0.0, backprop=("2", "4"), backprop_lr=1e-2, weight_decay=0.1)
    assert zo.backprop is not None
    zo.backprop.max_norm = max_norm
    plain[0].requires_grad_(False)
    learning = [p for p in plain.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(learning, lr=1e-2, weight_decay=0.1)
    for batch in batches(5):
        zo.step(loss_of(model, batch))
        adamw.zero_grad()
        loss_of(plain, batch)().backward()
        norm = nn.utils.clip_grad_norm_(learning, max_norm or float("inf"))
        adamw.step()
        assert zo.backprop.norm == pytest.approx(norm.item(), rel=1e-6)
    assert same(model, plain)


class Cast(nn.Module):
    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.to(self.dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weights_of_64_bits_move_as_under_torch_alone(dtype: torch.dtype) -> None:
    """Also beside a head of 32 bits, clipped by the norm of both."""
    model = make(nn.Sequential(Cast(dtype), nn.Linear(12, 3))).double()
    model[4].to(dtype)
    plain = copy.deepcopy(model)
    zo = ZeroOrder(model, lr=0.0, backprop=("2", "4"), backprop_lr=1e-2)
    assert zo.backprop is not None
    zo.backprop.bound(0.05)
    learning = [*plain[2].parameters(), *plain[4].parameters()]
    adamw = torch.optim.AdamW(learning, lr=1e-2, weight_decay=0.0)
    for inputs, labels in batches(3):
        batch = inputs.double(), labels
        zo.step(loss_of(model, batch))
        adamw.zero_grad()
        loss_of(plain, batch)().backward()
        norm = nn.utils.clip_grad_norm_(learning, 0.05)
        adamw.step()
        assert zo.backprop.norm == pytest.approx(norm.item(), rel=1e-6)
    assert same(model, plain)


def test_gradients_of_micro_batches_are_added() -> None:
    model, plain = make(), make()
    zo = ZeroOrder(model, lr=0.0, backprop=("2", "4"))
    plain[0].requires_grad_(False)
    adamw = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
    first, second, third = batches(3)
    zo.measure(loss_of(model, first))
    zo.measure_all([loss_of(model, second), loss_of(model, third)])
    zo.optimizer.step()
    for batch in (first, second, third):
        loss_of(plain, batch)().backward()
    adamw.step()
    assert same(model, plain)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"estimator": "fzoo", "lr": 1e-4},
        {"rule": "momentum", "num_probes": 3},
        {"noise": "low_rank"},
        {"normalise": "curvature"},
        {"estimator": "conservative"},
    ],
    ids=str,
)
def test_the_other_weights_move_as_if_the_named_were_frozen(settings: dict[str, Any]) -> None:
    model, frozen = make(), make()
    hybrid = ZeroOrder(model, **{"lr": 1e-3, **settings, "backprop": HEAD, "backprop_lr": 1e-2})
    frozen[4].requires_grad_(False)
    alone = ZeroOrder(frozen, **{"lr": 1e-3, **settings})
    for batch in batches(4):
        assert float(hybrid.step(loss_of(model, batch))) == float(alone.step(loss_of(frozen, batch)))
        assert not torch.equal(model[4].weight, frozen[4].weight)
        with torch.no_grad():
            for mine, theirs in zip(model[4].parameters(), frozen[4].parameters(), strict=True):
                theirs.copy_(mine)
    hybrid.close()
    alone.close()
    assert same(model, frozen)


def test_keys_are_those_of_a_run_in_which_the_named_are_frozen() -> None:
    """A prefix that all slots share is removed, and without a head there may be one."""
    model = nn.ModuleDict({"body": make(), "head": nn.Linear(3, 3)})
    keys = [slot.key for slot in ZeroOrder(model, lr=1e-3, backprop=("head",)).slots]
    model["head"].requires_grad_(False)
    assert keys == [slot.key for slot in ZeroOrder(model, lr=1e-3).slots]


def test_both_follow_the_schedule() -> None:
    """A rate that is scheduled from the group that holds a weight; with OneCycleLR, whose rate begins below its own."""
    model = make()
    groups = [{"params": model[:4].parameters(), "lr": 1e-3}, {"params": model[4].parameters(), "weight_decay": 0.5}]
    optimizer = ZOOptimizer(groups, lr=1e-2)
    zo = ZeroOrder(model, optimizer=optimizer, backprop=HEAD, backprop_lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [1e-3, 1e-2], total_steps=4, cycle_momentum=False)
    assert zo.backprop is not None
    inner = zo.backprop.optimizer
    assert inner is not None
    for batch in batches(3):
        rate = optimizer.param_groups[1]["lr"]
        zo.step(loss_of(model, batch))
        assert inner.param_groups[0]["lr"] == pytest.approx(rate)
        assert inner.param_groups[0]["weight_decay"] == 0.5
        schedule.step()
    assert len(inner.param_groups) == 1


def test_beside_a_torch_optimizer_for_the_rest() -> None:
    model, frozen = make(), make()
    frozen[4].requires_grad_(False)
    one = ZeroOrder(model, optimizer=torch.optim.Adam(model.parameters(), lr=1e-3), backprop=HEAD)
    other = ZeroOrder(frozen, optimizer=torch.optim.Adam(frozen.parameters(), lr=1e-3))
    batch = batches(1)[0]
    one.step(loss_of(model, batch))
    other.step(loss_of(frozen, batch))
    assert same(model[:4], frozen[:4])
    assert not torch.equal(model[4].weight, frozen[4].weight)


def test_a_checkpoint_continues_bit_for_bit() -> None:
    whole, half = make(), make()
    trained(whole, 6, backprop=HEAD, backprop_lr=1e-2)
    zo = trained(half, 3, backprop=HEAD, backprop_lr=1e-2)
    resumed = make()
    resumed.load_state_dict(copy.deepcopy(half.state_dict()))
    again = ZeroOrder(resumed, lr=1e-3, backprop=HEAD, backprop_lr=1e-2)
    again.load_state_dict(copy.deepcopy(zo.state_dict()))
    for batch in batches(6)[3:]:
        again.step(loss_of(resumed, batch))
    assert same(resumed, whole)


def test_a_checkpoint_of_another_kind_of_run_is_refused() -> None:
    with_, without = trained(make(), 1, backprop=HEAD), trained(make(), 1)
    with pytest.raises(StateError, match="backprop"):
        without.load_state_dict(with_.state_dict())
    old = without.state_dict()
    del old["optimizer"]["zo"]["settings"]["backprop"]  # as written before there was the setting
    with pytest.raises(StateError, match="without backprop"):
        with_.load_state_dict(old)


def test_a_snapshot_has_the_named_weights_and_their_state() -> None:
    model = make()
    zo = trained(model, 2, backprop=HEAD, backprop_lr=1e-2)
    kept, before = zo.snapshot(), copy.deepcopy(model)
    batch = batches(1)[0]
    zo.step(loss_of(model, batch))
    after = copy.deepcopy(model)
    assert not torch.equal(model[4].weight, before[4].weight)
    kept.restore()
    assert same(model, before)
    zo.step(loss_of(model, batch))
    assert same(model, after)


def test_autograd_keeps_the_activations_of_the_named_modules_alone() -> None:
    model = make()
    zo = ZeroOrder(model, lr=1e-3, backprop=HEAD)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x, y = batches(1)[0]

    def closure() -> Tensor:
        hidden = model[:4](x)
        assert not hidden.requires_grad
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return F.cross_entropy(model[4](hidden), y)

    zo.step(closure)
    assert kept
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not zo.backprop._total  # type: ignore[union-attr]


class Failing(torch.autograd.Function):
    """Fails when it is differentiated."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError("out of memory")


def test_an_exception_in_the_backward_leaves_no_trace() -> None:
    model = make()
    zo = ZeroOrder(model, lr=1e-3, backprop=HEAD)
    batch, before = batches(1)[0], copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        zo.step(lambda: Failing.apply(loss_of(model, batch)()))
    assert same(model, before)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    reference = make()
    zo.step(loss_of(model, batch))
    ZeroOrder(reference, lr=1e-3, backprop=HEAD).step(loss_of(reference, batch))
    assert same(model, reference)


@pytest.mark.parametrize("kind", ["nan", "gradient", "query"])
def test_a_skipped_step_moves_neither_part(kind: str) -> None:
    model = make()
    zo = ZeroOrder(model, lr=1e-3, backprop=HEAD)
    batch = batches(1)[0]
    zo.step(loss_of(model, batch))
    before, calls = copy.deepcopy(model), []

    def closure() -> Tensor:
        calls.append(1)
        loss = loss_of(model, batch)()
        if kind == "query" and len(calls) == 3:
            raise QueryError("no answer")
        if kind == "gradient":
            return loss + 0.0 * (model[4].weight - model[4].weight.detach()).sqrt().sum()  # zero times infinity
        return loss * float("nan") if kind == "nan" else loss

    record = zo.step(closure)
    assert record.skipped
    assert same(model, before)
    zo.step(loss_of(model, batch))
    assert not same(model, before)


def test_a_score_is_ascended() -> None:
    model, plain = make(), make()
    batch = batches(1)[0]
    ZeroOrder(model, lr=1e-3, backprop=HEAD, maximize=True).step(lambda: -loss_of(model, batch)())
    ZeroOrder(plain, lr=1e-3, backprop=HEAD).step(loss_of(plain, batch))
    assert torch.equal(model[4].weight, plain[4].weight)


def test_dropout_masks_and_buffers_are_those_of_the_probes() -> None:
    model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Dropout(0.5), nn.Linear(12, 3))
    drawn: list[Tensor] = []
    model[2].register_forward_hook(lambda module, args, out: drawn.append(out.detach() != 0))
    zo = ZeroOrder(model, lr=1e-6, eps=1e-6, backprop=("3",), dropout=True)
    statistics = model[1].running_mean.clone()
    zo.step(loss_of(model, batches(1)[0]))
    assert all(torch.equal(mask, drawn[0]) for mask in drawn)
    assert torch.equal(model[1].running_mean, statistics)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("heads",), "'heads' is no module"),
        (("model.4",), "'model.4' is no module"),
        (("4", "weight"), "did you mean '0.weight'"),
        (("*",), "none is left for forward passes"),
        (("0",), "frozen"),
    ],
)
def test_names_that_do_not_fit(names: tuple[str, ...], words: str) -> None:
    model = make()
    if words == "frozen":
        model[0].requires_grad_(False)
    with pytest.raises(ConfigError, match=words):
        ZeroOrder(model, lr=1e-3, backprop=names)


def test_names_are_of_modules_parameters_or_patterns() -> None:
    def named(*names: str) -> set[str]:
        backprop = ZeroOrder(make(), lr=1e-3, backprop=names).backprop
        assert backprop is not None
        return set(backprop.weights)

    assert named("4") == named("[3-9]") == {"4.weight", "4.bias"}
    assert named("2.bias", "*.weight") == {"2.bias", "0.weight", "2.weight", "4.weight"}


def test_what_cannot_work_is_an_error(tmp_path: Any) -> None:
    with pytest.raises(ConfigError) as raised:
        ZOConfig(backprop=HEAD, brake="rollback", lr="auto", backprop_lr=-1.0)
    assert len(raised.value.problems) == 3
    with pytest.raises(ConfigError, match="several names"):
        ZOConfig(backprop="lm_head")
    with pytest.raises(ConfigError, match="float16"):
        ZeroOrder(make().half(), lr=1e-3, backprop=HEAD)
    model = make()
    zo = ZeroOrder(model, lr=1e-3, backprop=HEAD)
    with pytest.raises(StateError, match="no seed log"):
        SeedLogWriter.attach(zo, tmp_path / "seedlog.zo")
    with pytest.raises(StateError, match="cannot be repeated"):
        zo.repeat((), 1.0)
    with pytest.raises(ConfigError, match="suggest_lr"):
        zo.suggest_lr([loss_of(model, batches(1)[0])])
    with pytest.raises(LossError, match=r"without \.item"):
        zo.step(lambda: loss_of(model, batches(1)[0])().item())  # type: ignore[arg-type, return-value]


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.body(self.embed(ids))), ids)


def test_a_tied_head_is_trained_right_and_its_cost_is_said(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, ids = Tied(), torch.arange(5)
    plain = copy.deepcopy(model)
    with caplog.at_level(logging.WARNING, "zo_core"):
        zo = ZeroOrder(model, lr=0.0, backprop=("head",))
    assert "embed.weight" in caplog.text
    zo.step(lambda: model(ids))
    plain(ids).backward()
    torch.optim.AdamW([plain.embed.weight], lr=1e-4, weight_decay=0.0).step()
    assert torch.equal(model.embed.weight, plain.embed.weight)


def test_weights_that_are_unfrozen_during_a_run_join() -> None:
    model = make()
    model[2].requires_grad_(False)
    zo = ZeroOrder(model, lr=1e-3, backprop=("[2-9]",))
    first, second = batches(2)
    zo.step(loss_of(model, first))
    model[2].requires_grad_(True)
    before = model[2].weight.detach().clone()
    zo.step(loss_of(model, second))
    assert not torch.equal(model[2].weight, before)
    assert len(zo.slots) == 2


def test_a_run_that_unfroze_named_weights_goes_on_in_an_engine_that_has_all_of_them() -> None:
    """With a group of the AdamW for each weight decay, of which the unfrozen weight has the first."""

    def engine(model: nn.Sequential) -> ZeroOrder:
        groups = [{"params": model[:4].parameters(), "weight_decay": 0.5}, {"params": model[4:].parameters()}]
        return ZeroOrder(model, optimizer=ZOOptimizer(groups, lr=1e-3), backprop=("[2-9]",), backprop_lr=1e-2)

    model, resumed = make(nn.Linear(12, 12)), make(nn.Linear(12, 12))
    model[2].requires_grad_(False)
    zo = engine(model)
    for index, batch in enumerate(batches(4)):
        model[2].requires_grad_(index > 1)
        zo.step(loss_of(model, batch))
    resumed.load_state_dict(copy.deepcopy(model.state_dict()))
    again = engine(resumed)
    again.load_state_dict(copy.deepcopy(zo.state_dict()))
    for batch in batches(3):
        zo.step(loss_of(model, batch))
        again.step(loss_of(resumed, batch))
    assert same(model, resumed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_both_parts_see_the_current_weights(dtype: torch.dtype) -> None:
    """Autocast keeps casts of weights as long as its context lasts, here for the whole run."""
    model, reference = make().to(dtype), make().to(dtype)
    first, second = batches(2)
    with torch.autocast("cpu", torch.bfloat16):
        zo = ZeroOrder(model, lr=1e-3, backprop=HEAD, backprop_lr=1e-2)
        for batch in (first, second):
            zo.step(loss_of(model, (batch[0].to(dtype), batch[1])))
    other = ZeroOrder(reference, lr=1e-3, backprop=HEAD, backprop_lr=1e-2)
    for batch in (first, second):
        with torch.autocast("cpu", torch.bfloat16):
            other.step(loss_of(reference, (batch[0].to(dtype), batch[1])))
    assert same(model, reference)
