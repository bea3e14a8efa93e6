"""Law: a run that went back has the weights of the step it went back to, and its log replays to all of its steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from models import closure, tiny
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from traces import same_bits, weights

from zo_core import NOISES, RULES, SeedLog, SeedLogWriter, StateError, ZeroOrder, ZOOptimizer, replay
from zo_core.noise import Passes
from zo_core.noise.direction import Scaling
from zo_core.noise.hashing import BATCH_WORDS
from zo_core.records import Rollback, StepRecord

STEPS = 60
#: Steps whose losses are far above all others; the brake goes back at the third one of each three.
HIGH = {24, 25, 26, 45, 46, 47}
LR = 1e-3
OWN_RULES = [name for name in RULES if RULES.resolve(name).undoable]


def brake_closure(name: str, model: nn.Module, step: int) -> Callable[[], Tensor]:
    """The loss of a step; some are raised by as much at all points, which changes no estimate."""
    loss = closure(name, model, step % 4)
    return lambda: loss() + 50.0 * (step in HIGH)


def train(
    path: Path | None, model: nn.Module, name: str, steps: range = range(STEPS), zo: Any = None, **settings: Any
) -> tuple[ZeroOrder, list[StepRecord], list[dict[str, Tensor]]]:
    """Trains with a schedule; returns the records, and the weights before each step and after the last."""
    zo = zo or ZeroOrder(model, **{"lr": LR, "brake": "rollback", **settings})
    schedule = LambdaLR(zo.optimizer, lambda step: 1 / (1 + 0.1 * step))
    log = None if path is None else SeedLogWriter.attach(zo, path)
    records, seen = [], [weights(model)]
    for step in steps:
        records.append(zo.step(brake_closure(name, model, step)))
        schedule.step()
        seen.append(weights(model))
    if log is not None:
        log.close()
    return zo, records, seen


def rollbacks(records: list[StepRecord]) -> dict[int, Rollback]:
    return {record.step: record.rollback for record in records if record.rollback is not None}


def assert_replays(path: Path, base: Callable[[], Any], seen: list[dict[str, Tensor]]) -> None:
    for until in (None, 9, 26, 27, 28, 40, 48):
        model = base()
        at = replay(model, path, until)
        model = getattr(model, "model", model)
        assert same_bits(weights(model), seen[at]), f"other weights at step {at}"


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def low_rank(noise: str) -> Any:
    """Short windows, so that going back meets several of them."""
    return {"name": noise, "refresh": 5} if noise == "low_rank" else noise


@pytest.mark.parametrize("rule", OWN_RULES)
@pytest.mark.parametrize("noise", list(NOISES))
def test_a_run_goes_back_and_its_log_replays(noise: str, rule: str, tmp_path: Path) -> None:
    settings = {"noise": low_rank(noise), "rule": rule, "weight_decay": 0.1}
    _, records, seen = train(tmp_path / "log", tiny("mlp"), "mlp", **settings)
    done = rollbacks(records)
    assert list(done) == [26, 47]
    assert [one.factor for one in done.values()] == [0.5, 0.25]
    assert [records[step].lr for step in (25, 26, 27)] == [
        pytest.approx(LR * factor / (1 + 0.1 * step)) for step, factor in ((25, 1), (26, 1), (27, 0.5))
    ]
    assert not same_bits(seen[26], seen[27])
    assert [entry.rollback for entry in SeedLog.read(tmp_path / "log").steps] == [one.rollback for one in records]
    assert_replays(tmp_path / "log", lambda: tiny("mlp"), seen)


@pytest.mark.parametrize("normalise", ["gradient", "curvature"])
def test_the_normaliser_goes_back_with_the_weights(normalise: str, tmp_path: Path) -> None:
    settings = {"normalise": normalise, "lr": 1e-4}
    zo, records, seen = train(tmp_path / "log", tiny("mlp"), "mlp", **settings)
    assert list(rollbacks(records)) == [26, 47]
    to = rollbacks(records)[26].to
    assert records[26].normaliser == records[to - 1].normaliser != records[25].normaliser
    assert_replays(tmp_path / "log", lambda: tiny("mlp"), seen)
    for start in (0, 20, 40):
        again = ZeroOrder(tiny("mlp"), **settings)
        replay(again, tmp_path / "log", start)
        replay(again, tmp_path / "log")
        assert again.normaliser == zo.normaliser


def llama_settings(noise: str, rule: str) -> dict[str, Any]:
    return {"noise": low_rank(noise), "rule": rule, "weight_decay": 0.1, "steps": range(32)}


@cache
def resident_run(noise: str, rule: str) -> Any:
    return train(None, tiny("llama"), "llama", **llama_settings(noise, rule))


@pytest.mark.parametrize(
    ("noise", "rule", "place"),
    [
        # On the disk each noise meets a rule, and each rule several noises; the other cells are slow.
        pytest.param(noise, rule, place, marks=[pytest.mark.slow] if place == "disk" and (i + j) % 3 else [])
        for i, noise in enumerate(NOISES)
        for j, rule in enumerate(OWN_RULES)
        for place in ("cpu", "disk")
    ],
)
def test_streamed_runs_go_back_as_resident_ones_do(noise: str, rule: str, place: str, tmp_path: Path) -> None:
    settings = llama_settings(noise, rule)
    _, resident, seen = resident_run(noise, rule)
    streamed = tiny("llama")
    where = {"offload": place, **({"offload_dir": str(tmp_path / "blocks")} if place == "disk" else {})}
    zo, records, found = train(tmp_path / "log", streamed, "llama", **settings, **where)
    zo.close()
    assert list(rollbacks(records)) == [26]
    assert rollbacks(records) == rollbacks(resident)
    assert all(same_bits(a, b) for a, b in zip(found, seen, strict=True))
    model = tiny("llama")
    again = ZeroOrder(model, **{**{k: v for k, v in settings.items() if k != "steps"}, "lr": LR}, offload="cpu")
    assert replay(again, tmp_path / "log") == 32
    assert same_bits(weights(model), seen[-1])
    again.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", OWN_RULES)
def test_going_back_is_exact_up_to_rounding(rule: str, dtype: torch.dtype) -> None:
    settings = {"rule": rule, "weight_decay": 0.1, "steps": range(27), "lr": 1e-2}
    if rule == "momentum":
        settings["rule"] = {"name": "momentum", "beta": 0.0}  # with no momentum from before, there is none to coast on
    _, records, seen = train(None, tiny("mlp", dtype=dtype), "mlp", **settings)
    to = rollbacks(records)[26].to
    assert 0 < to < 16
    moved, left = largest_difference(seen[26], seen[to]), largest_difference(seen[27], seen[to])
    largest = max(float(value.abs().max()) for value in seen[to].values())
    coefficients = torch.finfo(torch.float32).eps * moved  # these are float32 with weights of any type
    assert left <= 4 * torch.finfo(dtype).eps * largest + coefficients
    assert moved > 2 * left


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", ["sgd", "sign"])
def test_what_stochastic_rounding_did_by_chance_is_undone_to_the_last_bit(rule: str, dtype: torch.dtype) -> None:
    """But for weights that change their sign or exponent on the way: few, as these here move by little."""
    _, records, seen = train(None, tiny("mlp", dtype=dtype), "mlp", rule=rule, steps=range(27), lr=2e-5)
    to = rollbacks(records)[26].to
    same = sum(int((seen[27][name] == seen[to][name]).sum()) for name in seen[to])
    moved = sum(int((seen[26][name] != seen[to][name]).sum()) for name in seen[to])
    count = sum(value.numel() for value in seen[to].values())
    assert moved > 0.05 * count
    assert same > 0.99 * count


def test_momentum_is_undone_with_the_momentum_of_its_time() -> None:
    """A run that goes back to its first step has no momentum from before it, so the weights are its first ones."""
    model, high = tiny("mlp", dtype=torch.float64), range(3, 6)
    zo = ZeroOrder(model, lr=1e-2, rule={"name": "momentum", "beta": 0.8}, weight_decay=0.3, brake="rollback")
    before = weights(model)
    for step in range(6):
        moved = weights(model)
        loss, factor = closure("mlp", model, step), 1e5 if step in high else 1.0
        record = zo.step(lambda loss=loss, factor=factor: loss() * factor)
    assert record.rollback == Rollback(0, 0.5)
    left, moved_by = largest_difference(weights(model), before), largest_difference(moved, before)
    assert left < torch.finfo(torch.float32).eps * moved_by
    assert not any(state["momentum"].any() for state in zo.optimizer.state.values())


def test_groups_go_back_at_their_own_rates(tmp_path: Path) -> None:
    def optimizer(model: nn.Module) -> ZOOptimizer:
        head = {"params": model.head.parameters(), "lr": 1e-2, "eps": 1e-2, "weight_decay": 0.5}
        return ZOOptimizer([{"params": model.inner.parameters(), "lr": 1e-4}, head])

    model = tiny("mlp")
    _, records, seen = train(
        tmp_path / "log", model, "mlp", zo=ZeroOrder(model, optimizer=optimizer(model), brake="rollback", num_probes=3)
    )
    assert list(rollbacks(records)) == [26, 47]
    assert largest_difference(seen[27], seen[records[26].rollback.to]) < 1e-6
    assert_replays(tmp_path / "log", lambda: tiny("mlp"), seen)


@pytest.mark.parametrize("at", [3, 20, 26, 27, 40])
@pytest.mark.parametrize(("noise", "rule"), [("rademacher", "momentum"), ("low_rank", "sgd"), ("sparse", "sign")])
def test_a_resumed_run_is_the_uninterrupted_one(noise: str, rule: str, at: int, tmp_path: Path) -> None:
    def make(model: nn.Module) -> ZeroOrder:
        optimizer = ZOOptimizer(model.parameters(), lr=LR)
        return ZeroOrder(model, optimizer=optimizer, noise=low_rank(noise), rule=rule, brake="rollback")

    whole = tiny("mlp")
    _, records, seen = train(None, whole, "mlp", zo=make(whole))
    model = tiny("mlp")
    zo, _, _ = train(None, model, "mlp", range(at), zo=make(model))
    torch.save({"model": model.state_dict(), "zo": zo.state_dict()}, tmp_path / "x")
    saved = torch.load(tmp_path / "x", weights_only=True)
    again = tiny("mlp")
    again.load_state_dict(saved["model"])
    zo = make(again)
    zo.load_state_dict(saved["zo"])
    zo.optimizer.param_groups[0]["lr"] = LR  # what the schedule of this test starts from
    schedule = LambdaLR(zo.optimizer, lambda step: 1 / (1 + 0.1 * (step + at)))
    assert schedule is not None
    for step in range(at, STEPS):
        record = zo.step(brake_closure("mlp", again, step))
        schedule.step()
        assert (record.rollback, record.lr) == (records[step].rollback, records[step].lr)
        assert same_bits(weights(again), seen[step + 1])


@pytest.mark.parametrize("mode", ["rollback", "warn", None])
def test_a_log_is_repeated_with_its_rollbacks_whatever_the_brake_does_now(mode: str | None, tmp_path: Path) -> None:
    _, records, seen = train(tmp_path / "log", tiny("mlp"), "mlp", rule="momentum")
    model = tiny("mlp")
    zo = ZeroOrder(model, lr=LR, rule="momentum", brake=mode)
    schedule = LambdaLR(zo.optimizer, lambda step: 1 / (1 + 0.1 * step))
    log = SeedLogWriter.attach(zo, tmp_path / "log", follow=True)
    for step in range(STEPS):
        entry = log.logged()
        assert entry is not None
        zo.repeat(entry.probes, entry.loss, entry.normaliser, entry.rollback)
        record = zo.optimizer.step()
        schedule.step()
        assert (record.rollback, record.lr) == (records[step].rollback, records[step].lr)
        assert same_bits(weights(model), seen[step + 1])
    assert log.logged() is None
    log.close()


@pytest.mark.parametrize("cut", ["before", "between"])
def test_a_rollback_without_its_step_is_dropped_when_the_log_is_continued(cut: str, tmp_path: Path) -> None:
    path = tmp_path / "log"
    _, _, seen = train(path, tiny("mlp"), "mlp")
    whole, log = path.read_bytes(), SeedLog.read(path)
    end = log.parsed.offsets[26] - (10 if cut == "before" else 0)
    path.write_bytes(whole[:end])
    assert SeedLog.read(path).next_step == 26
    assert same_bits(replayed(path), seen[26])
    for mode in (None, "rollback"):
        path.write_bytes(whole[:end])
        model = tiny("mlp")
        zo = ZeroOrder(model, lr=LR, brake=mode)
        schedule = LambdaLR(zo.optimizer, lambda step: 1 / (1 + 0.1 * step))
        writer = SeedLogWriter.attach(zo, path, follow=True)
        for step in range(STEPS):
            entry = writer.logged()
            if entry is None:
                zo.step(brake_closure("mlp", model, step))
            else:
                zo.repeat(entry.probes, entry.loss, entry.normaliser, entry.rollback)
                zo.optimizer.step()
            schedule.step()
        writer.close()
        assert same_bits(replayed(path), weights(model))
        assert same_bits(weights(model), seen[-1]) == (mode == "rollback")
        assert (path.read_bytes() == whole) == (mode == "rollback")


def replayed(path: Path) -> dict[str, Tensor]:
    model = tiny("mlp")
    replay(model, path)
    return weights(model)


def test_a_run_does_not_go_back_before_its_log(tmp_path: Path) -> None:
    model = tiny("mlp")
    zo, _, _ = train(None, model, "mlp", range(20))
    base, state = weights(model), zo.optimizer.param_groups[0]["lr"]
    log = SeedLogWriter.attach(zo, tmp_path / "log")
    for step in range(20, 30):
        record = zo.step(brake_closure("mlp", model, step))
        if record.rollback is not None:
            assert (step, record.rollback.to) == (26, 20)
    log.close()
    assert state == zo.optimizer.param_groups[0]["lr"]
    again = tiny("mlp")
    again.load_state_dict(base)
    assert replay(again, tmp_path / "log") == 30
    assert same_bits(weights(again), weights(model))


def test_an_engine_that_replayed_goes_on_at_the_rate_that_the_brake_had_left(tmp_path: Path) -> None:
    """Also with a log that began after the brake had acted: its first steps have half of the rate that is set."""
    model = tiny("mlp")
    zo, records, _ = train(None, model, "mlp", range(30))
    assert list(rollbacks(records)) == [26]
    base = {name: value.clone() for name, value in model.state_dict().items()}
    train(tmp_path / "log", model, "mlp", range(30, 35), zo=zo)
    other = tiny("mlp")
    other.load_state_dict(base)
    replayed = ZeroOrder(other, lr=LR, brake="rollback")
    replay(replayed, tmp_path / "log")
    assert same_bits(weights(other), weights(model))
    assert replayed.optimizer.factor == zo.optimizer.factor == 0.5


def test_a_replay_can_start_at_a_checkpoint_and_go_back_before_it(tmp_path: Path) -> None:
    _, _, seen = train(tmp_path / "log", tiny("mlp"), "mlp")
    model = tiny("mlp")
    zo = ZeroOrder(model, lr=LR)
    assert replay(zo, tmp_path / "log", 20) == 20
    assert replay(zo, tmp_path / "log") == STEPS
    assert same_bits(weights(model), seen[-1])
    assert zo.optimizer.factor == 0.25


def test_an_engine_that_lacks_the_updates_says_so() -> None:
    zo = ZeroOrder(tiny("mlp"), lr=LR)
    zo.at(30)
    zo.repeat((), 1.0, rollback=Rollback(8, 0.5))
    with pytest.raises(StateError, match=r"went back to step 8, and the updates are known from step 30 on"):
        zo.optimizer.step()


# Quantisation scales, and slots of many pieces


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("rule", OWN_RULES)
def test_moves_of_scales_are_reverted(rule: str, relative: bool) -> None:
    shape = torch.Size((40, 3))
    start = torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.5
    theta, state, moves = start.clone(), dict[str, Any](), []
    for step in range(20):
        direction = NOISES.resolve("rademacher").direction(
            "slot", shape, ((step, 0.3),), Passes(scaling=Scaling(relative))
        )
        moves.append((RULES.resolve(rule), direction, 0.03, 0.1))
        moves[-1][0].update(theta, state, *moves[-1][1:])
    moved = float((theta - start).abs().max())
    RULES.resolve(rule).undo(theta, state, moves)
    assert moved > 0.03
    assert float((theta - start).abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", OWN_RULES)
def test_a_slot_that_is_replayed_piece_by_piece_goes_back_as_it_did(
    rule: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    def large() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Module()
        model.weight = nn.Parameter(torch.randn(16 * BATCH_WORDS + 77).to(dtype))
        return model

    model = large()
    zo = ZeroOrder(model, lr=LR, rule=rule, brake="rollback", weight_decay=0.1)
    log = SeedLogWriter.attach(zo, tmp_path / "log")
    for step in range(30):
        zo.step(lambda step=step: (model.weight.float() ** 2).mean() + 50.0 * (step in HIGH))
    log.close()
    assert zo.optimizer.factor == 0.5
    again = large()
    replay(again, tmp_path / "log")
    assert same_bits(weights(again), weights(model))
