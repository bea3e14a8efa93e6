"""Law: `ZOTrainer` goes back from the last step of a run that ends worse than it began; others keep their bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hf_helpers import arguments, differing, logged, weights
from turning import FIRST, STEPS, Turning, assert_went_back, rows

from hf_zo import ZOTrainer, ZOTrainingArguments
from zo_core import last_look


class Counting(ZOTrainer):
    """Counts the calls of ``compute_loss``, as an attribute and for itself."""

    calls = 0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        type(self).calls += 1
        self.counted = getattr(self, "counted", 0) + 1
        return super().compute_loss(*args, **kwargs)


def run(path: Path, turns: bool, **settings: Any) -> Any:
    args = arguments(
        path, ZOTrainingArguments, max_steps=STEPS, per_device_train_batch_size=1, learning_rate=1e-2,
        lr_scheduler_type="constant", logging_steps=1, train_sampling_strategy="sequential", **settings,
    )  # fmt: skip
    trainer = Counting(model=Turning(), args=args, train_dataset=rows(turns))
    Counting.calls = 0
    trainer.train()
    return trainer


def test_a_run_that_ends_worse_goes_back_to_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(last_look, "PART", 1 / 3)
    trainer = run(tmp_path, turns=True)
    assert_went_back(caplog.text, Turning(), trainer.model, tmp_path / "out" / "seedlog.zo")


def test_a_run_that_ends_better_is_the_one_without_a_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for part in (1 / 3, 0.0):
        monkeypatch.setattr(last_look, "PART", part)
        trainer = run(tmp_path / str(part), turns=False)
        found.append((weights(trainer.model), trainer.counted, logged(trainer, "loss"), Counting.calls))
    assert differing(found[0][0], found[1][0]) == []
    assert found[0][1:3] == found[1][1:3]
    assert found[0][3] == found[1][3] + 2 * FIRST
