"""Law: the curves of a resumed run are those of the whole run."""

from __future__ import annotations

from pathlib import Path

import pytest
from hf_helpers import texts
from models import tiny

from hf_zo import ZOTrainer, ZOTrainingArguments


def trainer(folder: Path, steps: int) -> ZOTrainer:
    args = ZOTrainingArguments(
        str(folder), max_steps=steps, save_steps=3, zo_learning_rate="1e-3", lr_scheduler_type="constant", report_to=[],
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    return ZOTrainer(model=tiny("llama"), args=args, train_dataset=texts(16))


def test_a_resumed_run_is_shown_from_its_first_step(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", 6)
    whole.train()
    trainer(tmp_path / "parts", 4).train()
    resumed = trainer(tmp_path / "parts", 6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    expected, found = whole.zo.curves, resumed.zo.curves
    assert found.steps == 6
    assert found.losses() == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in expected.losses()]
    assert found.grads() == [(step, pytest.approx(grad, rel=1e-5)) for step, grad in expected.grads()]
    assert found.lrs() == expected.lrs()
    assert found.clock.forwards == 3 * 2
    assert resumed.zo.report(tmp_path / "report.html").exists()
