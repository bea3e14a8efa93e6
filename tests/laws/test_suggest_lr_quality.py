"""The suggested rate is near the best of a grid, and the run at it learns: two tasks of `benchmarks/suggest_lr.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.suggest_lr import FORWARDS, config, search, suggested, train
from benchmarks.task_list import make_task
from benchmarks.tasks import held_out


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spsa", "spsa momentum", "fzoo"])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_within_a_factor_of_3_of_the_best(name: str, method: str, tmp_path: Path) -> None:
    task = make_task(name, tmp_path)
    settings = config(task, method)
    lr = suggested(task, settings).lr
    grid = search(lambda rate: train(task, settings, rate, FORWARDS), lr)
    best = min(grid, key=grid.__getitem__)
    assert best / 3.0 <= lr <= 3.0 * best
    assert train(task, settings, lr, FORWARDS) < 0.75 * held_out(task, task.model)
