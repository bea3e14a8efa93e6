"""Law: losses do not depend on how closely probes look at repeated layers, nor on how these get their copies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import EVERY, FAMILIES, closure, tiny
from offload_helpers import assert_equal, make, train
from probing import EPS, POINTS, measure, moved
from torch import Tensor, nn

from zo_core import ZeroOrder
from zo_core.probing import layers
from zo_core.probing.resident import ASTRAY


@pytest.fixture(params=[False, True], ids=["by_module", "at_once"])
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether layers are copied at once, as on a GPU."""
    if request.param:
        monkeypatch.setattr(layers, "MODULE_BY_MODULE", frozenset())
    return bool(request.param)


class Block(nn.Module):
    """A layer that can use a weight of another one, choose between experts, and compute a loss of its own."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6, dtype=dtype), nn.Linear(6, 6, dtype=dtype)
        self.experts = nn.ModuleList([nn.Linear(6, 6, dtype=dtype) for _ in range(2)])
        self.chosen = [0, 1]
        self.other: list[Tensor] = []
        self.loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        for weight in self.other:
            x = x @ weight
        x = sum(self.experts[index](x) for index in self.chosen)
        return self.last(x)


class Blocks(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Block(dtype) for _ in range(3)])
        self.x = torch.randn(5, 6, dtype=dtype)

    def forward(self) -> Tensor:
        x = self.x
        for layer in self.layers:
            x = layer(x)
        return F.mse_loss(x, self.x)


def expected(model: nn.Module, loss: Any) -> list[float]:
    with torch.no_grad():
        return [loss(moved(model, point)).item() for point in POINTS]


@pytest.mark.parametrize("name", EVERY)
def test_every_model_has_the_losses_of_probes_that_look_at_everything(name: str, at_once: bool) -> None:
    model = tiny(name)
    zo, careful = ZeroOrder(model), ZeroOrder(model)
    careful.oracle.realisation.be_careful(True)
    expected = [loss.item() for loss in careful.oracle.losses(POINTS, closure(name, model))]
    for _ in range(2):  # the first point is looked at, and later ones less closely
        assert [loss.item() for loss in zo.oracle.losses(POINTS, closure(name, model))] == expected
    assert not careful.oracle.realisation.unobserved


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_of_a_transformer_are_not_looked_at_any_more(name: str, at_once: bool) -> None:
    model = tiny(name)
    zo = ZeroOrder(model)
    zo.oracle.losses(POINTS[:1], closure(name, model))
    found = zo.oracle.realisation.layers.values()
    assert found
    assert all(layer.known and layer.unobserved and layer.at_once == at_once for layer in found)


@pytest.mark.parametrize("settings", [{}, {"rule": "momentum", "num_probes": 2}, {"dropout": True}])
@pytest.mark.parametrize("name", ["llama", "opt", "t5", "mixtral"])
def test_streamed_equals_resident_with_layers_copied_at_once(
    name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    resident = train(*make(name), None, tmp_path, steps=4, **settings)
    monkeypatch.setattr(layers, "MODULE_BY_MODULE", frozenset())
    for offload in (None, "cpu"):
        assert_equal(resident, train(*make(name), offload, tmp_path, steps=4, **settings))


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_a_weight_of_another_layer_that_is_used_late_is_the_perturbed_one(
    offload: str | None, at_once: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def run(careful: bool) -> tuple[list[float], list[bytes]]:
        model = Blocks()
        zo = ZeroOrder(model, lr=1e-2, eps=EPS, offload=offload)
        zo.oracle.realisation.be_careful(careful)
        losses = []
        for step in range(5):
            if step == 3:
                model.layers[1].other = [model.layers[0].first.weight, model.layers[2].last.weight]
            record = zo.step(model)
            losses += [record.loss, record.projected_grad]
        assert all(map(torch.isfinite, map(torch.tensor, losses)))
        zo.close()
        return losses, [p.detach().numpy().tobytes() for p in model.parameters()]

    expected = run(careful=True)
    caplog.clear()
    assert run(careful=False) == expected
    assert caplog.messages.count(ASTRAY) == 1


def test_a_loss_that_is_nan_by_itself_does_not_make_later_probes_look_again(caplog: pytest.LogCaptureFixture) -> None:
    model = Blocks()
    zo = ZeroOrder(model, lr=1e-2)
    factor = 1.0
    for step in range(4):
        factor = float("nan") if step == 2 else 1.0
        zo.step(lambda: model() * factor)  # noqa: B023 (it is called at once)
    assert zo.oracle.realisation.unobserved
    assert ASTRAY not in caplog.messages


def test_experts_that_are_not_chosen_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "MODULE_BY_MODULE", frozenset())
    model = Blocks()
    model.layers[1].chosen = [1]
    zo = ZeroOrder(model)
    copied: list[str] = []
    direction = zo.oracle.realisation.direction
    zo.oracle.realisation.direction = lambda slot, point: (copied.append(slot.key), direction(slot, point))[1]
    assert [loss.item() for loss in zo.oracle.losses(POINTS, model)] == expected(model, lambda other: other())
    assert not any("1.experts.0" in key for key in copied)
    assert [layer.at_once for layer in zo.oracle.realisation.layers.values()] == [True, False, True]
    model.layers[1].chosen = [0]  # and one that is chosen later is there
    assert [loss.item() for loss in zo.oracle.losses(POINTS, model)] == expected(model, lambda other: other())


class Graded(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.loss = F.mse_loss(self.first(x), x)
        return self.last(x)


def test_a_loss_within_a_layer_is_still_computed_in_float32(at_once: bool) -> None:
    model = Blocks(torch.bfloat16)
    model.layers = nn.ModuleList([Graded(torch.bfloat16) for _ in range(3)])
    zo = ZeroOrder(model)
    types: set[torch.dtype] = set()

    def loss() -> Tensor:
        x = model.x
        for layer in model.layers:
            x = layer(x)
        types.update(layer.loss.dtype for layer in model.layers)
        return sum(layer.loss for layer in model.layers)

    zo.oracle.losses(POINTS, loss)
    zo.oracle.losses(POINTS, loss)
    assert types == {torch.float32}


def test_a_layer_within_itself_keeps_its_values(at_once: bool) -> None:
    class Nested(Block):
        def forward(self, x: Tensor, depth: int = 0) -> Tensor:
            x = self.first(x).tanh()
            if depth < 2:
                x = self(x, depth + 1)
            return self.last(x)

    model = Blocks()
    model.layers = nn.ModuleList([Nested() for _ in range(2)])
    found = measure(model, model)
    assert found == expected(model, lambda other: other())


def test_a_slab_in_use_is_not_handed_out_again() -> None:
    pool = ZeroOrder(Blocks()).oracle.realisation.pool
    likes = [torch.empty(3, 5), torch.empty(7, dtype=torch.bfloat16)]
    first = pool.take_all(likes)
    kept = first[1][2:]
    del first
    second = pool.take_all(likes)
    assert second[1].data_ptr() != kept.untyped_storage().data_ptr()
    assert [one.data_ptr() % 64 for one in second] == [0, 0]
    where = second[0].data_ptr()
    del second
    assert pool.take_all(likes)[0].data_ptr() == where
