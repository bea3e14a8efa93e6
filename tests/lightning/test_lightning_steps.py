"""What a user sees of a step: one log entry, the mean loss, a skipped step, an exception that surfaces."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hf_helpers import differing, weights
from lightning.pytorch.callbacks import BackboneFinetuning, Callback, GradientAccumulationScheduler, TQDMProgressBar
from lightning.pytorch.callbacks import StochasticWeightAveraging as Swa
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import AdvancedProfiler, SimpleProfiler
from lightning_helpers import QUIET, TIERS, Tally, Wrapped, batches, fitted, loader, sgd, trainer
from models import tiny
from torch import nn
from torchmetrics import MeanMetric

from zo_core import LossError, ZeroOrder, ZOOptimizer

pytestmark = QUIET


class Noting(Callback):
    """Keeps what `on_train_batch_end` gets and what the trainer shows after each step."""

    def __init__(self) -> None:
        self.outputs: list[Any] = []
        self.metrics: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, *args: Any) -> None:
        self.outputs.append(outputs)
        assert "log" not in vars(module)

    def on_train_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def logged(run: L.Trainer) -> list[dict[str, str]]:
    """The rows that the CSV logger wrote."""
    with open(Path(run.log_dir) / "metrics.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def losses_of_a_bare_loop(count: int, **settings: Any) -> list[float]:
    model = tiny("llama")
    zo = ZeroOrder(model, lr=1e-3, **settings)
    return [float(zo.step(lambda batch=batch: model(**batch).loss)) for batch in batches(count=count)]


@pytest.mark.parametrize("tier", TIERS)
def test_each_step_is_logged_once_with_the_mean_over_the_probes(tmp_path: Path, tier: str | None) -> None:
    class Logging(Wrapped):
        calls = Tally()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            call = self.calls.next()
            loss = self.loss(batch)
            self.log("loss", loss, prog_bar=True, on_step=True, on_epoch=True, batch_size=2)
            self.log_dict({"twice": loss * 2, "count": 1})
            self.log("ones", 1.0, reduce_fx="sum", on_epoch=True, on_step=False)
            return {"loss": loss, "call": call}

    module, noting = Logging(), Noting()
    run = trainer(tmp_path, {"offload": tier}, logger=CSVLogger(tmp_path), callbacks=[noting])
    run.fit(module, loader(count=4))
    rows = logged(run)
    expected = losses_of_a_bare_loop(4)
    steps = [row for row in rows if row["loss_step"]]
    assert [int(row["step"]) for row in steps] == [0, 1, 2, 3]
    assert [float(row["loss_step"]) for row in steps] == pytest.approx(expected, abs=1e-6)
    assert [float(row["twice"]) for row in steps] == pytest.approx([2 * loss for loss in expected], abs=1e-6)
    assert {float(row["count"]) for row in steps} == {1.0}
    (epoch,) = [row for row in rows if row["loss_epoch"]]
    assert float(epoch["loss_epoch"]) == pytest.approx(sum(expected) / 4, abs=1e-6)
    assert float(epoch["ones"]) == 4.0
    assert [float(output["loss"]) for output in noting.outputs] == pytest.approx(expected, abs=1e-6)
    assert [output["call"] for output in noting.outputs] == [2, 4, 6, 8]  # the first step looks at a point twice
    assert run.progress_bar_metrics["loss_step"] == pytest.approx(expected[-1], abs=1e-6)


def test_metric_objects_see_one_forward_a_step_and_are_logged_once(tmp_path: Path) -> None:
    class Metrics(Wrapped):
        def __init__(self) -> None:
            super().__init__()
            self.mean = MeanMetric()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.mean(loss)
            kept.append(float(loss))
            self.log("mean", self.mean, on_step=False, on_epoch=True)
            return loss

    kept: list[float] = []
    noting = Noting()
    fitted(tmp_path, Metrics(), callbacks=[noting])
    assert len(kept) == 13
    assert noting.metrics[0]["mean"] == pytest.approx(sum(kept[2::2]) / 6, abs=1e-6)  # that of the last probe


@pytest.mark.parametrize("tier", TIERS)
def test_the_progress_bar_and_profilers_work(tmp_path: Path, tier: str | None, capsys: Any) -> None:
    run = trainer(
        tmp_path,
        {"offload": tier},
        enable_progress_bar=True,
        callbacks=[TQDMProgressBar(refresh_rate=1)],
        profiler="simple",
    )
    run.fit(Wrapped(), loader(count=2))
    assert "100%" in capsys.readouterr().out
    assert "ZOStrategy.training_step" in run.profiler.summary()


class OwnProfile(Wrapped):
    """Measures a part of its own step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with self.trainer.profiler.profile("mine"):
            return self.loss(batch)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("profiler", [SimpleProfiler, AdvancedProfiler])
def test_a_module_may_profile_parts_of_its_step(tmp_path: Path, tier: str | None, profiler: Any) -> None:
    fitted(tmp_path, OwnProfile(), {"offload": tier}, profiler=profiler(tmp_path, "profile"), data=loader(count=2))


@pytest.mark.parametrize("tier", TIERS)
def test_a_loss_that_is_not_finite_skips_its_step_and_says_so(tmp_path: Path, tier: str | None, caplog: Any) -> None:
    class Nan(Wrapped):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * (float("nan") if batch_idx == 1 else 1.0)

    make = lambda m: torch.optim.SGD(m.parameters(), lr=1e-3)  # noqa: E731
    noting = Noting()
    mine = fitted(tmp_path, Nan(optimizer=make), {"offload": tier}, callbacks=[noting])
    assert "step 1 skipped, weights untouched: a loss is not finite" in caplog.text
    model = tiny("llama")
    zo = ZeroOrder(model, lr=1e-3)
    for index, batch in enumerate(batches()):
        factor = float("nan") if index == 1 else 1.0
        zo.step(lambda batch=batch, factor=factor: model(**batch).loss * factor)
    assert not differing(mine, weights(model))
    assert [torch.isnan(output["loss"]).item() for output in noting.outputs] == [i == 1 for i in range(6)]


def test_a_first_loss_of_nan_is_logged_as_nan(tmp_path: Path) -> None:
    class Nan(Wrapped):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch) * (float("nan") if batch_idx == 0 else 1.0)
            self.log("loss", loss)
            return loss

    run = trainer(tmp_path, logger=CSVLogger(tmp_path))
    run.fit(Nan(), loader(count=3))
    rows = [row for row in logged(run) if row["loss"]]
    assert [row["loss"] == "nan" for row in rows] == [True, False, False]


def test_a_weight_out_of_sight_is_logged_with_its_real_loss(tmp_path: Path, caplog: Any) -> None:
    class Logging(Wrapped):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.log("loss", loss)
            return loss

    noting = Noting()
    run = trainer(tmp_path, callbacks=[noting], logger=CSVLogger(tmp_path))
    run.fit(Logging("unseen"), loader("unseen", count=2))
    rows = [row for row in logged(run) if row["loss"]]
    assert "where they cannot be observed" in caplog.text
    assert [float(row["loss"]) for row in rows] == pytest.approx([float(o["loss"]) for o in noting.outputs])
    assert all(torch.isfinite(output["loss"]) for output in noting.outputs)


@pytest.mark.parametrize("tier", TIERS)
def test_none_skips_as_it_does_elsewhere(tmp_path: Path, tier: str | None, caplog: Any) -> None:
    class Skipping(Wrapped):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx in (1, 2, 3) else loss

    mine = fitted(
        tmp_path, Skipping(optimizer=sgd(momentum=0.9)), {"offload": tier}, accumulate_grad_batches=2
    )  # 0 and none, none and none, 4 and 5
    assert "step 1 skipped, weights untouched: training_step returned None in every probe" in caplog.text
    model = tiny("llama")
    zo = ZeroOrder(model, lr=1e-3, rule="momentum")
    data = batches()
    for step, indices in ((0, [0]), (2, [4, 5])):
        zo.step_count = step
        for index in indices:
            zo.measure(lambda index=index: model(**data[index]).loss / 2)
        zo.optimizer.step()
    assert not differing(mine, weights(model))


def test_none_in_some_probes_skips_the_step(tmp_path: Path, caplog: Any) -> None:
    class Half(Wrapped):
        calls = Tally()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if self.calls.next() % 2 else self.loss(batch)

    module = Half()
    mine = fitted(tmp_path, module)
    assert "step 5 skipped, weights untouched: training_step returned None in some probes" in caplog.text
    assert not differing(mine, weights(tiny("llama")))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("fatal", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_a_probe_surfaces_and_harms_nothing(tmp_path: Path, tier: str | None, fatal: Any) -> None:
    class Failing(Wrapped):
        calls = Tally()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            call = self.calls.next()
            loss = super().training_step(batch, batch_idx)
            if call == 7:  # the second probe of step 2; the first step has one more
                raise fatal("in a probe")
            return loss

    module = Failing()
    with pytest.raises(SystemExit if fatal is KeyboardInterrupt else fatal):
        fitted(tmp_path, module, {"offload": tier})
    model = tiny("llama")
    zo = ZeroOrder(model, lr=1e-3)
    for batch in batches(count=2):
        zo.step(lambda batch=batch: model(**batch).loss)
    assert not differing({n.removeprefix("model."): v for n, v in weights(module).items()}, weights(model))
    assert "log" not in vars(module)
    assert all(child.training for child in module.modules())


def test_what_is_no_number_is_an_error_that_says_so(tmp_path: Path) -> None:
    class Words(Wrapped):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": "low"}

    with pytest.raises(LossError, match="a str"):
        fitted(tmp_path, Words())


def test_a_number_without_gradient_is_a_loss(tmp_path: Path) -> None:
    class Score(Wrapped):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return float(self.loss(batch))

    assert not differing(fitted(tmp_path, Score()), fitted(tmp_path, Wrapped()))


def test_a_module_may_take_its_batch_apart(tmp_path: Path) -> None:
    class Popping(Wrapped):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            labels = batch.pop("labels")
            return self.model(**batch, labels=labels).loss

    assert not differing(fitted(tmp_path, Popping()), fitted(tmp_path, Wrapped()))


class Hooked(Wrapped):
    """A module with hooks of its own around the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        assert isinstance(optimizer, torch.optim.SGD)
        self.seen.append("before")
        self.log("in_hook", 1.0)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        if batch_idx == 1:
            closure()  # measured, and then not applied
        else:
            optimizer.step(closure=closure)

    def on_after_backward(self) -> None:
        self.seen.append("backward")


def test_hooks_of_the_module_around_the_optimizer(tmp_path: Path) -> None:
    module = Hooked()
    mine = fitted(tmp_path, module, data=loader(count=3))
    assert module.seen == ["before", "before"]
    model = tiny("llama")
    zo = ZeroOrder(model, lr=1e-3)
    for step, batch in enumerate(batches(count=3)):
        if step != 1:
            zo.step_count = step
            zo.step(lambda batch=batch: model(**batch).loss)
    assert not differing(mine, weights(model))


class Finetuned(Wrapped):
    def __init__(self) -> None:
        super().__init__("mlp")
        self.backbone = self.model.inner

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-2, momentum=0.9)


@pytest.mark.parametrize("tier", TIERS)
def test_layers_that_a_callback_unfreezes_are_trained(tmp_path: Path, tier: str | None) -> None:
    class Watch(Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
            state = trainer.strategy.lightning_module_state_dict()
            epochs.append({name: value.clone() for name, value in state.items()})

    epochs: list[Any] = []
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-2, verbose=False)
    module = Finetuned()
    settings = {"offload": tier, "blocks": ("model.inner",)}
    fitted(tmp_path, module, settings, max_epochs=2, callbacks=[finetuning, Watch()], data=loader("mlp"))
    before = weights(Finetuned())
    assert set(differing(before, epochs[0])) == {"model.head.weight", "model.head.bias"}
    assert "model.inner.0.weight" in differing(epochs[0], epochs[1])


def test_weight_averaging_and_accumulation_by_epoch(tmp_path: Path) -> None:
    callbacks = [Swa(swa_lrs=1e-3, swa_epoch_start=1), GradientAccumulationScheduler({0: 1, 1: 2})]
    module = Wrapped("convnet")
    run = trainer(tmp_path, callbacks=callbacks[:1], max_epochs=3)
    run.fit(module, loader("convnet"))
    assert torch.isfinite(module.model.norm.running_mean).all()
    assert module.model.norm.num_batches_tracked > 0  # the epoch that updates statistics ran
    run = trainer(tmp_path, callbacks=callbacks[1:], max_epochs=2)
    run.fit(Wrapped("mlp"), loader("mlp"))
    assert run.global_step == 6 + 3


def test_groups_of_a_zo_optimizer_keep_their_eps(tmp_path: Path) -> None:
    def groups(model: nn.Module) -> list[dict[str, Any]]:
        return [
            {"params": model.head.parameters(), "lr": 1e-2, "eps": 1e-2},
            {"params": model.inner.parameters(), "lr": 1e-3},
        ]

    model = tiny("mlp")
    zo = ZeroOrder(model, optimizer=ZOOptimizer(groups(model)))
    for batch in batches("mlp"):
        zo.step(lambda batch=batch: model(**batch))
    module = Wrapped("mlp", optimizer=lambda m: ZOOptimizer(groups(m.model)))
    assert not differing(fitted(tmp_path, module, data=loader("mlp")), weights(model))


def test_the_loggers_of_the_library_stay_quiet_in_a_good_run(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    fitted(tmp_path, Wrapped())
    assert [r.message for r in caplog.records if r.name.startswith(("zo_core", "lightning_zo"))] == []
