"""Law: what a trainer's `compute_loss` does to its attributes has happened once per micro-batch, not once per probe."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hf_helpers import PLACES, Batch, logged, zo_trainer
from torch import nn
from transformers import TrainerCallback

from hf_zo import ZOTrainer
from zo_core import ZOConfig


class Counting(ZOTrainer):
    """Counts in all the ways in which people do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls, self.batches, self.seconds = 0, 0, 0.0
        self.last, self.best = 0.1, math.inf
        self.scale: float | None = None
        self.ready = False
        self.seen: list[tuple[Any, ...]] = []

    def compute_loss(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        found = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training:
            loss = found.item()
            before = (self.calls, self.last, self.best, self.scale, self.ready, getattr(self, "late", None))
            self.seen.append((*before, loss))
            self.calls += 1
            self.seconds += 0.5
            self.late = getattr(self, "late", 0) + 1
            self.last, self.best = loss, min(self.best, loss)
            if not self.ready:
                self.scale, self.ready = loss, True
        return found

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.batches += 1
        return super().training_step(*args, **kwargs)


@pytest.mark.parametrize(
    "settings",
    [*PLACES, {"num_probes": 3}, {"estimator": "fzoo"}, pytest.param({"lr": "auto"}, marks=pytest.mark.slow)],
    ids=str,
)
def test_a_subclass_counts_as_it_does_under_the_plain_trainer(tmp_path: Path, settings: dict[str, Any]) -> None:
    trainer = zo_trainer(tmp_path, cls=Counting, zo_config=ZOConfig(**settings))
    trainer.train()
    assert (trainer.calls, trainer.batches, trainer.seconds, trainer.late) == (4, 4, 2.0, 4)
    calls = trainer.seen[-4 * (len(trainer.seen) // 4) :]
    assert trainer.last == calls[-1][-1]  # to the last bit: nothing is added up
    assert math.isfinite(trainer.best)
    if "lr" not in settings:
        probes = len(calls) // 4
        steps = [calls[at : at + probes] for at in range(0, len(calls), probes)]
        # All probes of a step begin with the same values, and the step leaves what the last one has left.
        assert all(len({str(call[:-1]) for call in step}) == 1 for step in steps)
        assert trainer.best == min(step[-1][-1] for step in steps)
        assert trainer.scale == steps[0][-1][-1]
        assert [step[0][0] for step in steps] == [0, 1, 2, 3]


@pytest.mark.parametrize("settings", PLACES, ids=str)
def test_micro_batches_that_are_measured_together_count_apart(tmp_path: Path, settings: dict[str, Any]) -> None:
    changes = {"gradient_accumulation_steps": 2, "num_train_epochs": 2}
    trainer = zo_trainer(tmp_path, cls=Counting, zo_config=ZOConfig(**settings), **changes)
    trainer.train()
    assert trainer.state.global_step == 4
    assert (trainer.calls, trainer.batches, trainer.seconds, trainer.late) == (8, 8, 4.0, 8)
    ends = trainer.seen[-16:][1::2]  # two probes measure a micro-batch
    assert trainer.last == ends[-1][-1]
    assert trainer.best <= min(call[-1] for call in ends[1:])


class Counts(ZOTrainer):
    """Keeps nothing but a count."""

    calls = 0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().compute_loss(*args, **kwargs)


@pytest.mark.parametrize(("cls", "shared"), [(Counts, 3), (Counting, 0)])
def test_counters_do_not_keep_micro_batches_from_sharing_a_sweep(tmp_path: Path, cls: type, shared: int) -> None:
    changes = {"gradient_accumulation_steps": 2, "num_train_epochs": 2}
    trainer = zo_trainer(tmp_path, cls=cls, zo_config=ZOConfig(offload="cpu"), **changes)
    trainer.create_optimizer()
    oracle, done = trainer.zo.oracle, []
    sweep = oracle._sweep  # the first step has one for each micro-batch, to see whether they may share one
    oracle._sweep = lambda points, closures: done.append(len(closures)) or sweep(points, closures)
    trainer.train()
    assert trainer.calls == 8
    assert done.count(2) == shared


class Outside(TrainerCallback):
    """Counts from elsewhere, on the trainer, while a probe runs and between steps."""

    trainer: Any

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.steps += 1


def test_what_compute_loss_does_not_change_is_not_touched(tmp_path: Path) -> None:
    callback = Outside()
    trainer = zo_trainer(tmp_path, callbacks=[callback])
    callback.trainer, trainer.steps = trainer, 0
    trainer.train()
    assert trainer.steps == 4


class Fails(Counting):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        if self.calls == 3:
            raise RuntimeError("out of memory")
        return loss


def test_a_probe_that_fails_has_counted_nothing(tmp_path: Path) -> None:
    trainer = zo_trainer(tmp_path, cls=Fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert trainer.calls == trainer.late == 2


class Lazy(ZOTrainer):
    """Makes what it needs when it needs it."""

    teacher: Any = None
    made = 0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        if self.teacher is None:
            self.teacher, type(self).made = nn.Linear(2, 2), type(self).made + 1
        return super().compute_loss(*args, **kwargs)


def test_objects_are_made_once(tmp_path: Path) -> None:
    trainer = zo_trainer(tmp_path, cls=Lazy)
    trainer.train()
    assert Lazy.made == 1
    assert isinstance(trainer.teacher, nn.Linear)
    assert len(logged(trainer, "loss")) == 4
