"""What a user of `ZOTrainer` sees of weight decay to the start: the distance in the log, and a run that resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hf_helpers import differing, logged, weights, zo_trainer
from models import tiny

from zo_core import ZeroOrder, ZOConfig

SETTINGS: dict[str, Any] = {
    "weight_decay": 20.0,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "save_strategy": "steps",
    "save_steps": 2,
}


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_a_resumed_run_pulls_to_the_weights_of_the_start(tmp_path: Path, offload: str | None) -> None:
    own = {"zo_config": ZOConfig(rule={"name": "momentum", "decay_to": "start"}, offload=offload), **SETTINGS}
    trainer = zo_trainer(tmp_path, **own)
    trainer.train()
    assert isinstance(trainer.zo, ZeroOrder)
    assert logged(trainer, "zo_distance")[-1] == trainer.zo.distance() > 0.0
    trainer.zo.close()
    again = zo_trainer(tmp_path / "again", **own)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    again.zo.close()
    assert not differing(weights(again.model), weights(trainer.model))
    assert logged(again, "zo_distance")[-1] == logged(trainer, "zo_distance")[-1]
    assert differing(weights(again.model), weights(tiny("llama")))
