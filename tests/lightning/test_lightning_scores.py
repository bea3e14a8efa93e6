"""What a user sees of scores: a number from ``training_step``, logged as it was, and a step whose query failed."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from hf_helpers import differing, weights
from lightning.pytorch.loggers import CSVLogger
from lightning_helpers import QUIET, Wrapped, batches, fitted, loader, trainer
from models import tiny

from zo_core import ConfigError, QueryError, ZeroOrder, ZOOptimizer

pytestmark = QUIET

SETTINGS: dict[str, Any] = {"estimator": "es", "num_probes": 3, "maximize": True}


class Score(Wrapped):
    """Returns a Python float, which no gradient would follow."""

    def training_step(self, batch: Any, batch_idx: int) -> float:
        return -round(float(self.loss(batch)), 5)


def test_a_score_is_climbed_and_logged_by_name(tmp_path: Path) -> None:
    run = trainer(tmp_path, SETTINGS, logger=CSVLogger(tmp_path))
    module = Score()
    run.fit(module, loader(count=4))
    model = tiny("llama")
    zo = ZeroOrder(model, lr=1e-3, **SETTINGS)
    found = [zo.step(lambda b=b: -round(float(model(**b).loss), 5)).scores for b in batches(count=4)]  # type: ignore[misc]
    assert not differing({n.removeprefix("model."): w for n, w in weights(module).items()}, weights(model))
    with open(Path(run.log_dir or "") / "metrics.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["zo_score_mean"]]
    assert [float(row["zo_score_mean"]) for row in rows] == [scores.mean for scores in found if scores is not None]
    assert all(row["zo_score_std"] and row["zo_score_min"] and row["zo_score_max"] for row in rows)


@pytest.mark.parametrize("failing", [1, 2])
def test_a_query_that_fails_in_a_probe_skips_the_step(tmp_path: Path, failing: int) -> None:
    calls: list[int] = []

    class Asking(Score):
        def training_step(self, batch: Any, batch_idx: int) -> float:
            if batch_idx == 1:
                calls.append(batch_idx)
                if len(calls) == failing:
                    raise QueryError("the service is down")
            return super().training_step(batch, batch_idx)

    mine = fitted(tmp_path, Asking(), SETTINGS)
    model = tiny("llama")
    zo = ZeroOrder(model, lr=1e-3, **SETTINGS)
    for index, batch in enumerate(batches()):
        if index == 1:
            zo.skip("the same")
        else:
            zo.step(lambda batch=batch: -round(float(model(**batch).loss), 5))  # type: ignore[misc]
    assert len(calls) == failing
    assert not differing(mine, weights(model))


def test_the_distance_from_the_start_is_logged(tmp_path: Path) -> None:
    config = {"rule": {"name": "sgd", "decay_to": "start"}}
    run = trainer(tmp_path, config, logger=CSVLogger(tmp_path))
    module = Wrapped(optimizer=lambda module: ZOOptimizer(module.parameters(), lr=1e-3, weight_decay=1.0))
    run.fit(module, loader(count=3))
    with open(Path(run.log_dir or "") / "metrics.csv", encoding="utf-8") as file:
        found = [float(row["zo_distance"]) for row in csv.DictReader(file) if row["zo_distance"]]
    assert len(found) == 3
    assert 0.0 < found[0] < found[-1] == run.strategy.zo.distance()
    with pytest.raises(ConfigError, match="keeps the weights of the start"):
        trainer(tmp_path, config).fit(Wrapped(), loader(count=1))
