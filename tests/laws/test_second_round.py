"""Law: a second round measures where a step would lead, on what the first round has seen, and leaves no trace."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from models import batch, closure, tiny
from reference import Step, conservative
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from traces import generators, left_as_found, same_bits, weights

from zo_core import (
    Conservative,
    LossError,
    Point,
    ZeroOrder,
    ZOOptimizer,
    forward_state,
)

LR, EPS = 1e-2, 1e-2
PLACES: list[dict[str, Any]] = [{}, {"offload": "cpu"}, {"offload": "disk"}]
PLACE = pytest.mark.parametrize("place", PLACES, ids=["resident", "cpu", "disk"])


def engine(model: nn.Module, **settings: Any) -> ZeroOrder:
    given = {"optimizer"} & settings.keys()
    own = {} if given else {"lr": LR, "eps": EPS}
    return ZeroOrder(model, **{"estimator": "conservative", **own, **settings})


def finished(zo: ZeroOrder, model: nn.Module) -> dict[str, Tensor]:
    zo.close(torch.device("cpu"))
    return weights(model)


# The choice


def test_conservative_by_hand() -> None:
    estimator = Conservative()
    assert estimator.multiples == (1.0, 0.0, -1.0)
    assert estimator.choose([1.0, 2.0, 3.0]) == 1.0
    assert estimator.choose([2.0, 1.0, 3.0]) == 0.0
    assert estimator.choose([2.0, 3.0, 1.0]) == -1.0
    # A step too small for its effect on the loss is taken, and one that changes nothing is not reversed.
    assert estimator.choose([1.0, 1.0, 1.0]) == 1.0
    assert estimator.choose([2.0, 1.0, 1.0]) == 0.0
    assert estimator.choose([float("inf"), 1.0, 2.0]) == 0.0


@pytest.mark.parametrize(
    ("name", "rate", "choices"), [("llama", 5e-2, {1, 0}), ("mlp", 3.0, {1, 0}), ("mlp", 9.0, {1, 0, -1})]
)
def test_a_run_equals_the_reference(name: str, rate: float, choices: set[int]) -> None:
    rates = [rate / (1 + step) for step in range(12)]  # not every step of these lowers the loss
    fast, slow = tiny(name), tiny(name)
    losses = [closure(name, slow, index) for index in range(2)]
    expected = conservative(slow, losses, rates, EPS, weight_decay=0.1)
    zo = engine(fast, weight_decay=0.1)
    found, chosen = [], set()
    for rate in rates:
        zo.lr = rate
        for index in range(2):
            zo.measure(closure(name, fast, index))
        record = zo.optimizer.step()
        found.append(Step(record.loss, record.projected_grad))
        along = record.probes[0].coefficient * record.projected_grad
        chosen.add((along > 0) - (along < 0))
    assert found == expected
    assert same_bits(weights(fast), weights(slow))
    assert chosen == choices


def tried(loss: Callable[[], Tensor], zo: ZeroOrder) -> list[float]:
    """The losses of the second round of a step."""
    seen: list[float] = []

    def counted() -> Tensor:
        value = loss()
        seen.append(value.item())
        return value

    zo.step(counted)
    return seen[-3:]


GROUPS = {
    "plain": {},
    "several directions": {"num_probes": 3},
    "normalised": {"normalise": True, "lr": 1e-3},
    "curvature": {"normalise": "curvature", "lr": 0.5},
    "clipped": {"clip": 1e-2, "lr": 1.0},
    "gaussian": {"noise": "gaussian"},
    "sparse": {"noise": "sparse"},
    "sampled": {"noise": "sampled"},
    "nearest": {"stochastic_rounding": False},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("settings", GROUPS.values(), ids=GROUPS)
def test_the_weights_after_a_step_have_the_loss_that_was_measured_for_them(
    settings: dict[str, Any], dtype: torch.dtype
) -> None:
    model = tiny("mlp", dtype=dtype)
    loss = closure("mlp", model)
    zo = engine(model, **settings)
    for _ in range(6):
        losses = tried(loss, zo)
        assert zo.oracle.losses([Point(0, 0.0)], loss)[0].item() == min(losses)


def test_groups_move_at_their_own_rates_and_distances() -> None:
    model = tiny("mlp")
    optimizer = ZOOptimizer(
        [
            {"params": model.inner.parameters(), "lr": 1.0, "eps": EPS},
            {"params": model.head.parameters(), "lr": 0.1, "eps": 4 * EPS},
        ]
    )
    zo = engine(model, optimizer=optimizer)
    chosen = set()
    for _ in range(8):
        losses = tried(closure("mlp", model), zo)
        chosen.add(losses.index(min(losses)))
        assert zo.oracle.losses([Point(0, 0.0)], closure("mlp", model))[0].item() == min(losses)
    assert len(chosen) > 1


def test_the_rate_is_that_of_the_step_not_of_the_measurement() -> None:
    model, other = tiny("mlp"), tiny("mlp")
    zo, expected = engine(model, lr=1.0), engine(other)
    zo.measure(closure("mlp", model))
    zo.lr = LR
    assert zo.optimizer.step().as_dict() == expected.step(closure("mlp", other)).as_dict()
    assert same_bits(weights(model), weights(other))


# What the closures see


class Noisy(nn.Module):
    """Layers with dropout, a running centre and a counter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Tanh()) for _ in range(3))
        self.register_buffer("centre", torch.zeros(8))
        self.calls = 0
        self.seen: list[tuple[Any, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.functional.dropout(torch.ones(8), 0.5, training=self.layers[0][1].training)
        with torch._C.DisableTorchFunction():
            SEEN.append((mask.tolist(), self.centre.tolist(), self.calls, self.layers[0][1].training))
        for layer in self.layers:
            x = layer(x) + x
        loss = (x - self.centre).square().mean()
        self.centre.mul_(0.9).add_(0.1 * x.detach().mean(0))
        self.calls += 1
        return loss


SEEN: list[tuple[Any, ...]] = []
INPUTS = [torch.randn(4, 8, generator=torch.Generator().manual_seed(index)) for index in range(3)]


@pytest.mark.parametrize("dropout", [True, False])
@PLACE
def test_both_rounds_see_the_same_masks_buffers_and_attributes(place: dict[str, Any], dropout: bool) -> None:
    model = Noisy()
    zo = engine(model, dropout=dropout, **place)
    torch.manual_seed(3)
    for step in range(3):
        SEEN.clear()
        zo.measure_all([partial(model, x) for x in INPUTS[:2]])
        torch.rand(5)  # a data loader draws
        zo.measure(lambda: model(INPUTS[2]))
        first = list(SEEN)
        after = generators(), model.centre.clone(), model.calls
        torch.rand(7)
        model.eval()
        between = generators()
        SEEN.clear()
        zo.optimizer.step()
        model.train()
        second = list(SEEN)
        if step:  # earlier ones measure some points more
            assert len(first) == 6
            assert len(second) == 9
            assert [first[i] for i in (0, 2, 4) for _ in range(3)] == second
            assert len({str(seen[0]) for seen in second}) == (3 if dropout else 1)
        assert generators() == between != after[0]
        assert torch.equal(model.centre, after[1])
        assert model.calls == after[2]
    zo.close()


@PLACE
def test_a_second_round_leaves_what_a_step_without_one_leaves(place: dict[str, Any]) -> None:
    found = []
    for estimator in ("spsa", "conservative"):
        model = Noisy()
        zo = engine(model, dropout=True, estimator=estimator, lr=0.0, **place)
        torch.manual_seed(1)
        for _ in range(3):
            for x in INPUTS:
                zo.measure(partial(model, x))
            zo.optimizer.step()
        found.append((generators(), model.centre.tolist(), model.calls))
        zo.close()
    assert found[0] == found[1]


@PLACE
def test_buffers_too_large_to_copy_in_advance_are_the_same_from_the_second_step_on(
    place: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(forward_state, "IN_ADVANCE", 0)
    model = Noisy()
    zo = engine(model, dropout=True, **place)
    for step in range(3):
        SEEN.clear()
        for x in INPUTS:
            zo.measure(partial(model, x))
        first = list(SEEN)
        SEEN.clear()
        zo.optimizer.step()
        if step:
            assert [first[i] for i in (0, 2, 4) for _ in range(3)] == SEEN
            assert not caplog.records
        caplog.clear()
    zo.close()


def test_a_second_round_runs_under_the_autocast_of_the_first() -> None:
    model = tiny("mlp")
    zo = engine(model)
    seen: list[bool] = []

    def loss() -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return closure("mlp", model)()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        zo.measure(loss)
    zo.measure(loss)
    seen.clear()
    zo.optimizer.step()
    assert seen == [True] * 3 + [False] * 3
    assert not torch.is_autocast_enabled("cpu")


class Doubling(TorchFunctionMode):
    """Doubles every cross entropy."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is nn.functional.cross_entropy else result


@pytest.mark.parametrize("leaves", [False, True])
def test_a_second_round_runs_under_the_function_modes_of_the_first(leaves: bool) -> None:
    model, other = tiny("mlp"), tiny("mlp")
    zo, expected = engine(model), engine(other)
    seen: list[float] = []

    def loss() -> Tensor:
        value = closure("mlp", model)()
        seen.append(value.item())
        return value

    for _ in range(3):
        seen.clear()
        with Doubling():
            zo.measure(loss)
            if not leaves:
                zo.optimizer.step()
        if leaves:
            zo.optimizer.step()
        assert seen[-3:] == tried(lambda: 2 * closure("mlp", other)(), expected)


# Faults, and what is left behind


@PLACE
@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt])
def test_an_exception_in_the_second_round_costs_only_the_step(kind: type[BaseException], place: dict[str, Any]) -> None:
    model, other = tiny("llama"), tiny("llama")
    zo, expected = engine(model, normalise=True, **place), engine(other, normalise=True, **place)
    for each, owner in ((zo, model), (expected, other)):
        each.step(closure("llama", owner))
    fails = [False]

    def loss() -> Tensor:
        if fails[0]:
            raise kind
        return closure("llama", model)()

    zo.flush()
    with left_as_found(model):
        zo.measure(closure("llama", model, 1))
        zo.measure(loss)
        fails[0] = True
        state = generators()
        with pytest.raises(kind):
            zo.optimizer.step()
    assert generators() == state
    assert zo.continuity.whole
    assert zo.second is not None
    assert not zo.second.kept
    again = zo.step(closure("llama", model, 2))
    assert again.as_dict() == expected.step(closure("llama", other, 2)).as_dict()
    assert same_bits(finished(zo, model), finished(expected, other))


@pytest.mark.parametrize("last", ["step", "discard", "skip", "at", "repeat"])
@PLACE
def test_closures_and_batches_are_released(place: dict[str, Any], last: str) -> None:
    model = tiny("llama")
    zo = engine(model, **place)
    record = zo.step(closure("llama", model))
    inputs = batch("llama")
    held = weakref.ref(inputs["input_ids"])
    zo.measure(lambda inputs=inputs: model(**inputs).loss)
    del inputs
    gc.collect()
    assert held() is not None
    ends: dict[str, Callable[[], Any]] = {
        "step": zo.optimizer.step,
        "discard": zo.discard,
        "skip": lambda: zo.skip("a reason"),
        "at": lambda: zo.at(3),
        "repeat": lambda: zo.repeat(record.probes, record.loss),
    }
    ends[last]()
    gc.collect()
    assert held() is None
    zo.close()


def test_estimators_with_one_round_keep_nothing() -> None:
    model = tiny("mlp")
    zo = engine(model, estimator="spsa")
    assert zo.second is None
    inputs = batch("mlp")
    held = weakref.ref(inputs["x"])
    zo.measure(lambda inputs=inputs: model(**inputs))
    del inputs
    gc.collect()
    assert held() is None


def test_weights_whose_loss_is_not_finite_are_not_kept(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("mlp")
    zo = engine(model, lr=1e-3)
    calls = [0]

    def broken(values: list[float]) -> Callable[[], Tensor]:
        calls[0] = 0

        def loss() -> Tensor:
            calls[0] += 1
            return closure("mlp", model)() + (0.0 if calls[0] <= 2 else values[calls[0] - 3])

        return loss

    zo.step(closure("mlp", model))  # the first step measures one point more
    values = weights(model)
    record = zo.step(broken([float("nan"), 0.0, 10.0]))
    assert record.skipped is None
    assert record.probes[0].coefficient == 0.0
    record = zo.step(broken([float("nan"), float("inf"), float("nan")]))
    assert record.skipped == "no loss of the second round is finite"
    assert record.probes == ()
    assert "no loss of the second round is finite" in caplog.text
    assert same_bits(weights(model), values)


def test_a_closure_that_returns_no_number_in_the_second_round_is_named() -> None:
    model = tiny("mlp")
    zo = engine(model)
    good = [True]
    zo.measure(lambda: closure("mlp", model)() if good[0] else None)
    good[0] = False
    with pytest.raises(LossError, match="returned None"):
        zo.optimizer.step()
