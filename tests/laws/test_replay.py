"""Law: replaying a log on the base model gives the trained weights, bit for bit, at every step of the run."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import adapted
from models import batch, closure, tiny
from peft import LoraConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from traces import same_bits, weights

from zo_core import (
    ESTIMATORS,
    NOISES,
    RULES,
    SeedLog,
    SeedLogWriter,
    StateError,
    ZeroOrder,
    ZOOptimizer,
    replay,
)
from zo_core.noise.hashing import BATCH_WORDS
from zo_core.seedlog import fingerprint

STEPS = 6
LR = 1e-2
OWN_RULES = [name for name in RULES if not RULES.resolve(name).wants_optimizer]


def train(
    path: Path, model: nn.Module, name: str, steps: int = STEPS, optimizer: Any = None, **settings: Any
) -> tuple[ZeroOrder, list[dict[str, Tensor]]]:
    """Trains with a cosine-like schedule and a log; returns the weights before each step and after the last."""
    zo = ZeroOrder(model, optimizer=optimizer, **({} if optimizer else {"lr": LR}), **settings)
    schedule = LambdaLR(zo.optimizer, lambda step: 1 / (1 + 0.37 * step))
    log = SeedLogWriter.attach(zo, path)
    seen = [weights(model)]
    for index in range(steps):
        zo.step(closure(name, model, index))
        schedule.step()
        seen.append(weights(model))
    log.close()
    return zo, seen


def assert_replays(path: Path, base: Callable[[], nn.Module], seen: list[dict[str, Tensor]]) -> None:
    for until in (None, 0, 1, len(seen) // 2):
        model = base()
        at = replay(model, path, until)
        assert at == (len(seen) - 1 if until is None else until)
        assert same_bits(weights(model), seen[at])
    assert not same_bits(seen[0], seen[-1])


SETTINGS: dict[str, dict[str, Any]] = {
    **{f"rule {name}": {"rule": name} for name in OWN_RULES},
    **{f"estimator {name}": {"estimator": name} for name in ESTIMATORS},
    **{f"noise {name}": {"noise": name, "rule": "momentum"} for name in NOISES},
    "4 probes": {"num_probes": 4},
    "clip": {"clip": 0.05, "num_probes": 2},
    "weight decay": {"weight_decay": 0.1},
    "all": {"num_probes": 3, "rule": {"name": "momentum", "beta": 0.5}, "weight_decay": 0.1, "clip": 0.3, "seed": -7},
    "no stochastic rounding": {"stochastic_rounding": False},
}


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.bfloat16,
        pytest.param(torch.float16, marks=pytest.mark.slow),
        pytest.param(torch.float64, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("settings", [pytest.param(value, id=name) for name, value in SETTINGS.items()])
def test_replay_is_training(settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    _, seen = train(tmp_path / "log", tiny("mlp", dtype=dtype), "mlp", **settings)
    assert_replays(tmp_path / "log", lambda: tiny("mlp", dtype=dtype), seen)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_replay_is_training_on_transformers(name: str, tied: bool, tmp_path: Path) -> None:
    _, seen = train(tmp_path / "log", tiny(name, tied), name, rule="momentum", weight_decay=0.1)
    assert_replays(tmp_path / "log", lambda: tiny(name, tied), seen)


class Large(nn.Module):
    """Slots of more than one batch of words for either noise, one of them not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.whole = nn.Parameter(torch.randn(32 * BATCH_WORDS + 77, generator=generator))
        self.turned = nn.Parameter(torch.randn(BATCH_WORDS // 256 + 3, 513, generator=generator).t())

    def forward(self) -> Tensor:
        return (self.whole.float() ** 2).mean() + (self.turned.float() ** 4).mean()


@pytest.mark.parametrize(
    ("rule", "noise", "dtype"),
    [
        # Every two of rule, noise and type meet in the quick ones.
        pytest.param(rule, noise, dtype, marks=[pytest.mark.slow] if (i + j + k) % 2 else [])
        for i, rule in enumerate(OWN_RULES)
        for j, noise in enumerate(name for name in NOISES if name != "coordinates")  # which is for few weights alone
        for k, dtype in enumerate((torch.float32, torch.bfloat16))
    ],
    ids=str,
)
def test_a_slot_that_is_replayed_piece_by_piece_is_as_it_was_trained(
    rule: str, noise: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys.modules["zo_core.seedlog.replay"], "CACHED_DIRECTIONS", 4
    )  # groups of two of the three steps
    model = Large().to(dtype)
    zo = ZeroOrder(model, lr=LR, rule=rule, noise=noise, num_probes=2, weight_decay=0.1)
    log = SeedLogWriter.attach(zo, tmp_path / "log")
    for _ in range(3):
        zo.step(model)
    log.close()
    again = Large().to(dtype)
    engine = ZeroOrder(again, rule=rule, noise=noise, num_probes=2)
    replay(engine, tmp_path / "log")
    assert same_bits(weights(again), weights(model))
    for slot, other in zip(zo.slots, engine.slots, strict=True):
        then, now = zo.optimizer.state.get(slot.tensor, {}), engine.optimizer.state.get(other.tensor, {})
        assert same_bits(then, now)
    assert (engine.step_count, engine.seed) == (3, 0)


def lora(name: str) -> nn.Module:
    return adapted(tiny(name), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


def test_adapters_on_a_frozen_base(tmp_path: Path) -> None:
    _, seen = train(tmp_path / "log", lora("llama"), "llama", eps=1e-2)
    assert_replays(tmp_path / "log", lambda: lora("llama"), seen)


def groups(model: nn.Module) -> ZOOptimizer:
    """The learning rates are no simple multiple of each other, so their ratio is not always the same float."""
    return ZOOptimizer(
        [
            {"params": model.inner.parameters(), "lr": 0.1 / 3, "weight_decay": 0.3},
            {"params": [model.head.weight], "lr": 0.007, "eps": 3e-3},
            {"params": [model.head.bias], "lr": 0.1 / 3},
        ],
        eps=1e-3,
    )


@pytest.mark.parametrize("rule", OWN_RULES)
def test_groups_with_their_own_rates_and_a_schedule(rule: str, tmp_path: Path) -> None:
    model = tiny("mlp")
    _, seen = train(tmp_path / "log", model, "mlp", optimizer=groups(model), rule=rule)
    assert_replays(tmp_path / "log", lambda: tiny("mlp"), seen)
    log = SeedLog.read(tmp_path / "log")
    assert log.parsed.settings.columns == (0, 1, 0)  # two rates a step, not three
    assert log.parsed.changes == 0


def test_whatever_changes_in_mid_run_is_in_the_log(tmp_path: Path) -> None:
    model = tiny("mlp")
    zo = ZeroOrder(model, optimizer=groups(model))
    log = SeedLogWriter.attach(zo, tmp_path / "log")
    seen = [weights(model)]

    def go() -> None:
        zo.step(closure("mlp", model))
        seen.append(weights(model))

    go()
    zo.optimizer.param_groups[2]["lr"] = 0.5  # leaves the column it shared
    go()
    zo.optimizer.param_groups[0]["weight_decay"] = 0.9
    zo.at(zo.step_count, seed=99)
    go()
    zo.optimizer.param_groups[1]["eps"] = 7e-3
    go()
    log.close()
    assert_replays(tmp_path / "log", lambda: tiny("mlp"), seen)
    assert SeedLog.read(tmp_path / "log").parsed.changes == 3


def test_skipped_steps_are_in_the_log_and_move_nothing(tmp_path: Path) -> None:
    model = tiny("mlp")
    zo = ZeroOrder(model, lr=LR, rule="momentum", weight_decay=0.5)
    log = SeedLogWriter.attach(zo, tmp_path / "log")
    for index, factor in enumerate((1.0, float("nan"), 1.0, float("inf"), 1.0)):
        zo.step(lambda index=index, factor=factor: closure("mlp", model, index)() * factor)
    log.close()
    steps = SeedLog.read(tmp_path / "log").steps
    assert [entry.skipped for entry in steps] == [False, True, False, True, False]
    again = tiny("mlp")
    replay(again, tmp_path / "log")
    assert same_bits(weights(again), weights(model))


@pytest.mark.parametrize("tier", ["cpu", "disk"])
@pytest.mark.parametrize("rule", ["momentum", pytest.param("sgd", marks=pytest.mark.slow)])
def test_a_streamed_model_is_replayed_block_by_block(rule: str, tier: str, tmp_path: Path) -> None:
    settings = {"rule": rule, "weight_decay": 0.1, "num_probes": 2}
    where = {"offload": tier, **({"offload_dir": str(tmp_path / "trained")} if tier == "disk" else {})}
    zo, seen = train(tmp_path / "log", tiny("llama"), "llama", **settings, **where)
    resident = tiny("llama")
    replay(resident, tmp_path / "log")
    assert same_bits(weights(resident), seen[-1])
    if tier == "disk":
        where["offload_dir"] = str(tmp_path / "replayed")
    engine = ZeroOrder(tiny("llama"), **settings, **where)
    assert fingerprint(engine) == SeedLog.read(tmp_path / "log").header["base"]
    before = engine.streaming.bytes_written
    replay(engine, tmp_path / "log")
    assert engine.streaming.bytes_written - before == sum(block.nbytes for block in engine.streaming.blocks)
    assert same_bits(weights(engine.model), seen[-1])
    record = engine.step(closure("llama", engine.model, 50))
    assert record.projected_grad == zo.step(closure("llama", zo.model, 50)).projected_grad
    engine.close()
    zo.close()


def test_a_checkpoint_goes_on_with_the_tail_of_the_log(tmp_path: Path) -> None:
    zo, seen = train(tmp_path / "log", tiny("mlp"), "mlp", steps=2, rule="momentum")
    state = copy.deepcopy(zo.state_dict())
    log = SeedLogWriter.attach(zo, tmp_path / "log", follow=True)
    for index in range(2, 5):
        zo.step(closure("mlp", zo.model, index))
    log.close()
    again = ZeroOrder(tiny("mlp"), rule="momentum")
    again.model.load_state_dict(seen[2])
    again.load_state_dict(state)
    assert replay(again, tmp_path / "log") == 5
    assert same_bits(weights(again.model), weights(zo.model))
    next_steps = [each.step(closure("mlp", each.model)).as_dict() for each in (zo, again)]
    assert {**next_steps[0], "lr": 0} == {**next_steps[1], "lr": 0}


def test_a_model_with_other_parameters_trainable_is_replayed_too(tmp_path: Path) -> None:
    model = tiny("mlp")
    model.inner.requires_grad_(False)
    _, seen = train(tmp_path / "log", model, "mlp")
    assert_replays(tmp_path / "log", lambda: tiny("mlp"), seen)
    fresh = tiny("mlp")
    replay(fresh, tmp_path / "log")
    assert all(p.requires_grad for p in fresh.parameters())


# What does not fit


def refuses(model: nn.Module | ZeroOrder, path: Path, match: str, until: int | None = None) -> None:
    before = weights(model if isinstance(model, nn.Module) else model.model)
    with pytest.raises(StateError, match=match):
        replay(model, path, until)
    assert same_bits(weights(model if isinstance(model, nn.Module) else model.model), before)


def test_another_base_model_is_an_error_that_names_both_sides(tmp_path: Path) -> None:
    path = tmp_path / "log"
    _, seen = train(path, tiny("mlp"), "mlp")
    trained = tiny("mlp")
    trained.load_state_dict(seen[-1])
    logged, here = SeedLog.read(path).header["base"]["digest"], fingerprint(ZeroOrder(trained))["digest"]
    refuses(trained, path, f"fingerprint {logged} in the log, {here} here")
    one = tiny("mlp")
    with torch.no_grad():
        one.head.bias[0] += 1e-7
    refuses(one, path, "head.bias of 6 trained tensors have other values")
    refuses(tiny("convnet"), path, r"trained 6 tensors and 2 of this model.*only in the log.*only here")
    refuses(tiny("mlp", dtype=torch.bfloat16), path, r"as float32 \[16, 8\], and this model has it as bfloat16")


def test_another_frozen_base_is_an_error(tmp_path: Path) -> None:
    train(tmp_path / "log", lora("llama"), "llama")
    other = lora("llama")
    with torch.no_grad():
        next(p for p in other.parameters() if not p.requires_grad).add_(1e-3)
    refuses(other, tmp_path / "log", "another frozen base")


@pytest.mark.parametrize(
    "settings", [{"rule": "sign"}, {"noise": "gaussian"}, {"num_probes": 2}, {"stochastic_rounding": False}], ids=str
)
def test_an_engine_of_another_kind_is_an_error(settings: dict[str, Any], tmp_path: Path) -> None:
    train(tmp_path / "log", tiny("mlp"), "mlp")
    refuses(ZeroOrder(tiny("mlp"), **settings), tmp_path / "log", f"is of a run with {next(iter(settings))}=")


def test_steps_that_the_log_does_not_have_are_an_error(tmp_path: Path) -> None:
    train(tmp_path / "log", tiny("mlp"), "mlp")
    refuses(tiny("mlp"), tmp_path / "log", "until=7 is not a step", until=STEPS + 1)
    refuses(tiny("mlp"), tmp_path / "log", "until=-1 is not a step", until=-1)
    engine = ZeroOrder(tiny("mlp"))
    engine.step_count = STEPS + 1
    refuses(engine, tmp_path / "log", "does not continue an engine at step 7")


def test_the_torch_rule_says_at_the_start_that_it_cannot_be_replayed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny("mlp")
    train(tmp_path / "log", model, "mlp", optimizer=torch.optim.AdamW(model.parameters(), lr=LR))
    assert "the rule 'torch' leaves the update to AdamW" in caplog.text
    assert len(SeedLog.read(tmp_path / "log").steps) == STEPS
    refuses(tiny("mlp"), tmp_path / "log", "cannot be replayed: the rule 'torch' leaves the update to AdamW")


def test_a_log_that_begins_with_momentum_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    zo = ZeroOrder(tiny("mlp"), lr=LR, rule="momentum")
    zo.step(closure("mlp", zo.model))
    SeedLogWriter.attach(zo, tmp_path / "log").close()
    assert "has state from before this log" in caplog.text
    refuses(tiny("mlp"), tmp_path / "log", "has state from before this log")


def test_a_run_whose_log_begins_at_a_checkpoint_is_replayed_on_that(tmp_path: Path) -> None:
    zo = ZeroOrder(tiny("mlp"), lr=LR)
    zo.step(closure("mlp", zo.model))
    start = weights(zo.model)
    log = SeedLogWriter.attach(zo, tmp_path / "log")
    zo.step(closure("mlp", zo.model, 1))
    log.close()
    model = tiny("mlp")
    refuses(model, tmp_path / "log", "began with other weights")
    model.load_state_dict(start)
    assert replay(model, tmp_path / "log") == 2
    assert same_bits(weights(model), weights(zo.model))


@pytest.mark.parametrize("rule", ["sgd", "momentum", "sign"])
@pytest.mark.parametrize("tier", [None, "cpu"])
def test_low_rank_directions_are_replayed_with_their_windows(tier: str | None, rule: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "noise": {"name": "low_rank", "refresh": 3},
        "rule": rule,
        "lr": 1e-3,
        "weight_decay": 0.1,
    }
    model, inputs = tiny("llama"), batch("llama")
    zo = ZeroOrder(model, **settings, **({} if tier is None else {"offload": tier}))
    log = SeedLogWriter.attach(zo, tmp_path / "seedlog.zo")
    states = []
    for _ in range(8):
        zo.step(lambda: model(**inputs).loss)
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    log.close()
    for until in (8, 4):
        again = tiny("llama")
        assert replay(again, tmp_path / "seedlog.zo", until=until) == until
        found = again.state_dict()
        assert all(torch.equal(value, found[name]) for name, value in states[until - 1].items())
