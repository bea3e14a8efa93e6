"""Laws of the benchmark against other ways to train: each does what its name says, and tables read curves rightly."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import rivals
from benchmarks.contenders import RIVALS, TRIED, Trainer
from benchmarks.forwards_to_target import Outcome
from benchmarks.rival_methods import Blockwise, PublishedMezo, in_backward
from benchmarks.rivals import Cost
from benchmarks.subspaces import Subspace, orthogonal
from benchmarks.tasks import Task, cross_entropy

PACKAGES = {"galore": "galore_torch", "apollo": "apollo_torch"}


def tiny() -> Task:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, max_position_embeddings=32)).eval()
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    return Task(model, lambda step: (ids[:, :-1], ids[:, 1:]), cross_entropy)


@pytest.mark.parametrize("name", [*RIVALS, *TRIED])
def test_every_rival_takes_steps_and_moves_the_weights(name: str) -> None:
    if find_spec(PACKAGES.get(name, "torch")) is None:
        pytest.skip(f"needs {PACKAGES[name]}")
    task = tiny()
    trainer = Trainer({**RIVALS, **TRIED}[name], task, 0, 0)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    steps = 18 if name.startswith("mask-") else 3  # the first 16 only score the weights
    losses = [trainer.step(task.data(step)) for step in range(steps)]
    assert all(math.isfinite(loss) for loss in losses)
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


def test_sgd_in_the_backward_pass_is_sgd_and_keeps_no_gradient() -> None:
    one, other = tiny(), tiny()
    in_backward(one.model, 0.1, 0)(lambda: one.loss(one.model, one.data(0)))
    optimizer = torch.optim.SGD(other.model.parameters(), lr=0.1)
    other.loss(other.model, other.data(0)).backward()
    optimizer.step()
    assert all(p.grad is None for p in one.model.parameters())
    for mine, theirs in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_one_layer_at_a_time_moves_one_layer() -> None:
    task = tiny()
    before = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    step = Blockwise(task.model, 1e-3, 0, every=2)
    for _ in range(2):
        step(lambda: task.loss(task.model, task.data(0)))
    moved = {name.split(".")[2] for name, p in task.model.named_parameters() if not torch.equal(p, before[name])}
    assert len(moved) == 1
    for _ in range(2):
        step(lambda: task.loss(task.model, task.data(0)))
    assert len({n.split(".")[2] for n, p in task.model.named_parameters() if not torch.equal(p, before[n])}) == 2
    assert sum(p.grad is not None for p in task.model.parameters()) == 9  # of one layer


def test_newton_schulz_makes_columns_nearly_orthonormal() -> None:
    matrix = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.tensor([1.0, 2, 3, 5]))
    values = torch.linalg.svdvals(orthogonal(matrix))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_a_step_of_the_plain_low_rank_method_is_the_estimate_along_its_directions() -> None:
    """On a linear loss a two-sided difference is exact: with one direction of full rank the step is g z."""
    weight = nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
    gradient = torch.arange(6.0, dtype=torch.float64).view(3, 2)
    model = nn.ParameterList([weight])
    Subspace(model, 0.5, 0, rank=2)(lambda: (gradient * weight).sum())
    basis = torch.Generator().manual_seed(0)
    right = torch.linalg.qr(torch.randn(2, 2, generator=basis))[0]
    z = (torch.randn(3, 2, generator=basis) @ right.t()).double()
    torch.testing.assert_close(weight.data, -0.5 * (gradient * z).sum() * z, rtol=1e-6, atol=1e-9)


def test_published_mezo_is_the_difference_along_reseeded_normals() -> None:
    weight = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    gradient = torch.arange(4.0, dtype=torch.float64)
    PublishedMezo(nn.ParameterList([weight]), lr=0.1, eps=1e-3).step(lambda: (gradient * weight).sum())
    torch.manual_seed(1)
    z = torch.normal(mean=0, std=1, size=(4,), dtype=torch.float64)
    torch.testing.assert_close(weight.data, -0.1 * (gradient * z).sum() * z)


def test_losses_at_other_forwards_are_interpolated() -> None:
    run = Outcome(((0.0, 3.0), (10.0, 3.0), (20.0, 3.0), (30.0, 0.0)), 1.0)
    assert rivals.at_forwards(run, 25.0) == 2.5
    assert rivals.at_forwards(run, 99.0) == 2.0


def test_a_scaled_step_has_the_length_of_an_orthogonal_one() -> None:
    method = Subspace(nn.Linear(6, 5, bias=False), 0.1, 0, rank=2, even=True)
    slot = method.slots[0]
    slot.momentum = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    moved = method._moved(slot)
    torch.testing.assert_close(moved.norm(), torch.tensor(math.sqrt(2.0)))
    torch.testing.assert_close(moved / moved.norm(), slot.momentum / slot.momentum.norm())


def test_memory_is_the_median_of_its_processes_and_time_that_of_the_one_that_measured_it() -> None:
    found = [Cost(peak=peak, rest=4e6) for peak in (3e6, 9e6, 5e6)]
    assert rivals.cells(found, 1_000_000) == ["5 (3 to 9)", "4", "4.0", "", ""]
    assert rivals.cells([*found, Cost(step=1.0, forward=0.5)], 1_000_000)[3:] == ["1.00", "2.0"]


def test_names_in_the_plot_cover_neither_points_nor_each_other() -> None:
    plots = pytest.importorskip("benchmarks.plots")
    figure, axes = plots.plt.subplots(figsize=(7, 4))
    names = {"one": (300.0, 1.9), "the second": (310.0, 1.9), "a long third name": (390.0, 1.86), "last": (400.0, 1.88)}
    for place in names.values():
        axes.plot(*place, "o")
    axes.set_xlim(250, 1000)
    rivals.label(axes, names)
    renderer = figure.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == sorted(names, key=names.__getitem__)
    assert not any(box.overlaps(other) for index, box in enumerate(boxes) for other in boxes[:index])
    assert not any(box.contains(*point) for box in boxes for point in axes.transData.transform([*names.values()]))
    plots.plt.close(figure)


def test_plots_are_of_results_of_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plots = pytest.importorskip("benchmarks.plots")
    monkeypatch.setattr(plots, "RESULTS", tmp_path)
    for name in ("a-cpu-2026-01-01", "a-cpu-2026-01-02", "a-cuda-2026-01-03", "a-more-cpu-2026-01-04"):
        (tmp_path / f"{name}.json").write_text(f'{{"title": "{name}"}}')
    assert plots.newest("a")["title"] == "a-cpu-2026-01-02"
