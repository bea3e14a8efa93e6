"""The suggested rate is near the best of a grid, and holds for a run much longer than the trials."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import tiny
from torch import Tensor, nn

from benchmarks.suggest_lr import FORWARDS, config, search, suggested, train
from benchmarks.task_list import make_task
from benchmarks.tasks import held_out
from zo_core import ZeroOrder, suggest_lr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"), [("mlp", "spsa"), ("mlp", "spsa momentum"), ("mlp", "fzoo"), ("cnn", "spsa")]
)
def test_within_a_factor_of_3_of_the_best(name: str, method: str, tmp_path: Path) -> None:
    task = make_task(name, tmp_path)
    settings = config(task, method)
    lr = suggested(task, settings).lr
    grid = search(lambda rate: train(task, settings, rate, FORWARDS), lr)
    best = min(grid, key=grid.__getitem__)
    assert best / 3.0 <= lr <= 3.0 * best
    assert train(task, settings, lr, FORWARDS) < 0.75 * held_out(task, task.model)


def rows(step: int, count: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step + 1_000)
    return torch.randint(4, 64, (count, 6), generator=generator), torch.randint(4, 64, (count, 6), generator=generator)


class Classifier(nn.Module):
    """A new head on a small BERT: has a row more small tokens than large ones?"""

    collapsed = math.log(2)

    def __init__(self) -> None:
        super().__init__()
        self.bert = tiny("bert")

    def forward(self, step: int) -> Tensor:
        ids, _ = rows(step)
        labels = (ids < 34).sum(1) > 3
        return F.cross_entropy(self.bert(input_ids=ids).logits[:, 0, :2], labels.long())


class Contrastive(nn.Module):
    """Finds a row among others by another one that shares a token. Collapsing lowers the loss, from 4.3 to log 16."""

    collapsed = math.log(16)

    def __init__(self) -> None:
        super().__init__()
        self.bert = tiny("bert")

    def embed(self, ids: Tensor) -> Tensor:
        return F.normalize(self.bert(input_ids=ids, output_hidden_states=True).hidden_states[-1].mean(1), dim=-1)

    def forward(self, step: int) -> Tensor:
        ids, others = rows(step)
        scores = 100.0 * self.embed(ids) @ self.embed(torch.cat([ids[:, :1], others[:, 1:]], 1)).t()
        return F.cross_entropy(scores, torch.arange(len(scores)))


@pytest.mark.slow
@pytest.mark.parametrize("linear", [False, True], ids=["constant", "linear"])
@pytest.mark.parametrize("make", [Classifier, pytest.param(Contrastive, marks=pytest.mark.slow)])
def test_the_rate_holds_for_ten_times_a_trial(make: type[Classifier | Contrastive], linear: bool) -> None:
    torch.manual_seed(0)
    model = make()
    closures = [lambda index=index: model(index) for index in range(8)]
    found = suggest_lr(model, closures, forwards=200)
    count = 10 * max(trial.steps for trial in found.curve)
    with torch.no_grad():
        before = sum(float(model(-index)) for index in range(1, 17)) / 16
    zo = ZeroOrder(model, lr=found.lr)
    for step in range(count):
        zo.lr = found.lr * (1.0 - step / count if linear else 1.0)
        zo.step(lambda step=step: model(100 + step))
    with torch.no_grad():
        after = sum(float(model(-index)) for index in range(1, 17)) / 16
    assert after < min(before, model.collapsed)
