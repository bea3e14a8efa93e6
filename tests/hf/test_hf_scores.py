"""Law: a `ZOTrainer` whose ``compute_loss`` returns a score climbs it, and a query that fails costs one step."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

from hf_helpers import arguments, differing, logged, texts, weights
from models import tiny

from hf_zo import ZOTrainer, ZOTrainingArguments
from zo_core import QueryError, SeedLog


class Scored(ZOTrainer):
    """Returns a Python number."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return 10.0 - float(super().compute_loss(*args, **kwargs))


class Failing(Scored):
    """One call gets no answer, in the second step: the first one has three members, one of them measured twice."""

    calls = count()  # of the class: the attributes of a trainer are the same for all probes

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        if next(Failing.calls) == 5:
            raise QueryError("the judge is away")
        return super().compute_loss(*args, **kwargs)


def run(path: Path, cls: type[ZOTrainer], **changes: Any) -> ZOTrainer:
    settings = {"zo_estimator": "es", "zo_num_probes": 3, "zo_maximize": True, "learning_rate": 1e-2, **changes}
    args = arguments(path, ZOTrainingArguments, **settings)
    trainer = cls(model=tiny("llama"), args=args, train_dataset=texts())
    trainer.train()
    return trainer


def test_a_score_is_climbed_and_logged_under_its_name(tmp_path: Path) -> None:
    up = run(tmp_path / "up", Scored)
    down = run(tmp_path / "down", ZOTrainer, zo_maximize=False)
    scores, losses = logged(up, "zo_score_mean"), logged(down, "zo_score_mean")
    assert [round(10.0 - score, 4) for score in scores] == [round(loss, 4) for loss in losses]
    assert [round(loss, 4) for loss in logged(up, "loss")] == [round(-score, 4) for score in scores]


def test_a_query_that_fails_skips_one_step(tmp_path: Path) -> None:
    trainer = run(tmp_path, Failing)
    log = SeedLog.read(tmp_path / "out" / "seedlog.zo")
    assert [entry.skipped for entry in log.steps] == [False, True, False, False]
    assert logged(trainer, "zo_skipped_steps") == [1.0]
    whole = run(tmp_path / "whole", Scored)
    assert differing(weights(trainer.model), weights(whole.model)) != []
