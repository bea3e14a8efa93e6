"""Law: under Lightning a second round measures what the first has measured, on every path to a step."""

from __future__ import annotations

import gc
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hf_helpers import differing, weights
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning_helpers import QUIET, Resumable, Wrapped, batches, fitted, loader, sgd, trainer
from models import tiny
from torch import Tensor

from zo_core import ConfigError, SeedLog, ZeroOrder, ZOOptimizer, replay

pytestmark = QUIET

PLACES: list[dict[str, Any]] = [{}, {"offload": "cpu"}, {"offload": "disk"}]
LR = 0.1


@pytest.mark.parametrize("place", PLACES, ids=["resident", "cpu", "disk"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("own", [False, True], ids=["SGD", "ZOOptimizer"])
def test_bare_loop_and_lightning_agree(own: bool, accumulate: int, place: dict[str, Any], tmp_path: Path) -> None:
    model = tiny("llama")
    zo = ZeroOrder(model, lr=LR, estimator="conservative")
    records = []
    for _ in range(2):
        for start in range(0, 6, accumulate):
            for batch in batches()[start : start + accumulate]:
                zo.measure(lambda batch=batch: model(**batch).loss / accumulate)
            records.append(zo.optimizer.step())
    assert {record.probes[0].coefficient * record.projected_grad > 0 for record in records} == {True, False}
    make = (lambda module: ZOOptimizer(module.parameters(), lr=LR)) if own else sgd(LR)
    module = Wrapped(optimizer=make)
    settings = {"estimator": "conservative", **place}
    mine = fitted(tmp_path, module, settings, accumulate_grad_batches=accumulate, max_epochs=2)
    assert not differing(mine, weights(model))
    base = Wrapped()
    replay(base, tmp_path / "seedlog.zo")
    assert not differing(weights(base.model), weights(model))


class Die(L.Callback):
    def __init__(self, after: int):
        self.after = after

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.after:
            raise ZeroDivisionError


@pytest.mark.filterwarnings("ignore:.*is set, but there is no last checkpoint available")
@pytest.mark.parametrize("every", [0, 2])
@pytest.mark.parametrize("place", PLACES[:2], ids=["resident", "cpu"])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(place: dict[str, Any], every: int, tmp_path: Path) -> None:
    def run(path: Path, die: int = 0, every: int = 0, ckpt: Any = None) -> Wrapped:
        torch.manual_seed(0)
        module = Wrapped(optimizer=sgd(LR))
        callbacks: list[Any] = [Die(die)] if die else []
        if every:
            callbacks.append(ModelCheckpoint(path, save_last=True, every_n_train_steps=every))
        settings = {"callbacks": callbacks, "max_epochs": 2, "accumulate_grad_batches": 2}
        made = trainer(path, {"estimator": "conservative", **place}, enable_checkpointing=bool(every), **settings)
        with suppress(ZeroDivisionError):
            made.fit(module, Resumable(), ckpt_path=ckpt)
        return module

    whole = run(tmp_path / "whole")
    run(tmp_path / "killed", 3, every)
    again = run(tmp_path / "killed", 0, every, "last")
    assert not differing(weights(whole), weights(again))
    one, other = (SeedLog.read(tmp_path / name / "seedlog.zo") for name in ("whole", "killed"))
    assert [entry.probes for entry in one.steps] == [entry.probes for entry in other.steps]


class Watching(Wrapped):
    """Notes what each call finds; draws, counts, and logs."""

    def __init__(self, **settings: Any):
        super().__init__("bert", **settings)
        self.calls = 0
        self.seen: tuple[Any, ...] = ()  # a tuple, so that it is not followed as the module's state
        SEEN.clear()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.calls += 1
        autocast = torch.is_autocast_enabled("cpu")
        SEEN.append((batch_idx, torch.rand(()).item(), self.calls, autocast, torch.is_grad_enabled()))
        loss = self.loss(batch)
        self.log("count", float(self.calls), on_step=True)
        self.log("total", 1.0, reduce_fx="sum", on_epoch=True, on_step=False)
        return loss


SEEN: list[tuple[Any, ...]] = []


@pytest.mark.parametrize("place", PLACES[:2], ids=["resident", "cpu"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_both_rounds_of_a_micro_batch_see_the_same_and_the_logs_only_the_first(
    precision: Any, place: dict[str, Any], tmp_path: Path
) -> None:
    found = []
    for estimator in ("spsa", "conservative"):
        torch.manual_seed(0)
        module = Watching(optimizer=sgd(0.0))
        made = trainer(
            tmp_path / estimator,
            {"estimator": estimator, "dropout": True, **place},
            precision=precision,
            accumulate_grad_batches=2,
            logger=CSVLogger(tmp_path / estimator),
        )
        made.fit(module, loader("bert"))
        found.append(
            (module.calls, torch.get_rng_state().tolist(), {k: float(v) for k, v in made.logged_metrics.items()})
        )
    first, second = SEEN[-10:-6], SEEN[-6:]
    assert len(set(first[:2])) == len(set(first[2:])) == 1
    assert second == [first[0]] * 3 + [first[2]] * 3
    assert first[0] != first[2]
    assert first[0][3] is (precision == "bf16-mixed")
    assert found[0][:2] == found[1][:2]
    assert found[0][2].keys() == found[1][2].keys()
    assert found[1][2]["count"] == found[1][0] == 6
    assert found[1][2]["total"] == 6.0


def test_an_exception_in_the_second_round_leaves_the_weights(tmp_path: Path) -> None:
    class Failing(Wrapped):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            zo = self.trainer.strategy.zo
            if zo.step_count == 2 and zo.directions.plan.probes:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    module, other = Failing(optimizer=sgd(LR)), Wrapped(optimizer=sgd(LR))
    run = trainer(tmp_path, {"estimator": "conservative"})
    with pytest.raises(ZeroDivisionError):
        run.fit(module, loader())
    fitted(tmp_path / "other", other, {"estimator": "conservative"}, max_steps=2)
    assert not differing(weights(module), weights(other))
    assert len(SeedLog.read(tmp_path / "seedlog.zo").steps) == 2
    assert "log" not in vars(module)


@pytest.mark.parametrize("place", PLACES[:2], ids=["resident", "cpu"])
def test_batches_are_released_after_each_step(place: dict[str, Any], tmp_path: Path) -> None:
    class Holding(Wrapped):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx % 2 == 0:
                gc.collect()
                assert all(held() is None for held in self.held[:-1])  # Lightning keeps the last one itself
            self.held.append(weakref.ref(batch["labels"]))

    class Fresh(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            yield from ({key: value.clone() for key, value in batch.items()} for batch in batches())

    module = Holding()
    module.held = []
    data = torch.utils.data.DataLoader(Fresh(), batch_size=None)
    trainer(tmp_path, {"estimator": "conservative", **place}, accumulate_grad_batches=2).fit(module, data)
    assert len(module.held) == 6


def test_momentum_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"with rule='momentum' .*; write rule='sgd', without momentum"):
        fitted(tmp_path, Wrapped(optimizer=sgd(momentum=0.9)), {"estimator": "conservative"})
