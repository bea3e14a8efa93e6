"""Law: layers that do not move are computed once for several probes, and every number is as if each computed them."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import arguments, texts
from models import FAMILIES, closure, tiny
from reuse_helpers import CALLS, LAYERS, WIDTH, Layer, Net, compare, net, of, skips
from torch import Tensor, nn
from traces import weights

from hf_zo import ZOTrainer, ZOTrainingArguments
from zo_core import ESTIMATORS, ZeroOrder
from zo_core.probing.reuse import RUNS, WATCHED, Run

NOISES: list[Any] = [
    "one_block",
    {"name": "one_block", "order": "random", "of": "gaussian"},
    {"name": "one_block", "of": {"name": "low_rank", "rank": 2, "refresh": 3}},
    "sampled",
    "coordinates",
]


@pytest.mark.parametrize(
    ("noise", "place"),
    [*((noise, place) for noise in NOISES for place in ("memory", "cpu")), ("one_block", "disk")],
    ids=str,
)
def test_blocks_in_turn(noise: Any, place: str, tmp_path: Path) -> None:
    where = {} if place == "memory" else {"offload": place, "blocks": ["layers"]}
    where |= {"offload_dir": str(tmp_path)} if place == "disk" else {}
    many = 12 if noise == "coordinates" else 2
    found = compare(net(freeze=None), noise=noise, num_probes=many, dropout=True, steps=12, **where)
    assert found.skipped
    assert not found.off


@pytest.mark.parametrize("offload", [None, "cpu"])
@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "forward_grad"])
def test_every_estimator(name: str, offload: str | None) -> None:
    where = {} if offload is None else {"offload": offload, "blocks": ["layers"]}
    for settings in ({}, {"dropout": True, "rule": "momentum", "weight_decay": 0.1}):
        settings = {} if name == "conservative" else settings
        assert compare(net(), estimator=name, num_probes=3, **settings, **where).skipped


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_early_layers_are_computed_once_a_step(offload: str | None) -> None:
    where = {} if offload is None else {"offload": offload, "blocks": ["layers"]}
    model = net()()
    zo = ZeroOrder(model, lr=1e-2, num_probes=3, reuse=True, **where)
    x = torch.randn(4, WIDTH)
    for _ in range(2):
        zo.step(lambda: model(x))
    CALLS.clear()
    zo.step(lambda: model(x))
    assert {**{str(index): 1 for index in range(LAYERS - 1)}, str(LAYERS - 1): 6} == CALLS
    zo.close()


def biases(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("bias" in name)


def test_each_coordinate_of_a_step_computes_the_layers_from_its_own_on() -> None:
    model = net(freeze=biases)()
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    zo = ZeroOrder(model, lr=1e-2, num_probes=count, noise="coordinates", seed=3, reuse=True)
    for _ in range(2):
        CALLS.clear()
        zo.step(lambda: model(torch.ones(4, WIDTH)))
    expected = [2 * WIDTH * (2 + index) for index in range(LAYERS)]  # those of its own weights, and of all before
    checks = LAYERS + 2  # at most one for each set of layers that is skipped, as often again as before
    assert all(known < CALLS[str(index)] <= known + checks for index, known in enumerate(expected))
    compare(net(freeze=biases), noise="coordinates", num_probes=count, steps=3)


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_with_dropout(name: str) -> None:
    def trained(reuse: bool) -> list[Tensor]:
        model = tiny(name, layers=3)
        model.config.use_cache = False
        model.train()
        zo = ZeroOrder(model, lr=1e-3, noise="one_block", num_probes=2, dropout=True, seed=1, reuse=reuse)
        torch.manual_seed(0)
        losses = [torch.tensor(zo.step(closure(name, model, step)).loss) for step in range(9)]
        return [*losses, torch.get_rng_state(), *model.state_dict().values()]

    with skips() as skipped:
        assert all(a.equal(b) for a, b in zip(trained(False), trained(True), strict=True))
    assert skipped


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_micro_batches_do_not_share_results(offload: str | None) -> None:
    where = {} if offload is None else {"offload": offload, "blocks": ["layers"]}
    found = []
    for reuse in (False, True):
        model = net()()
        zo = ZeroOrder(model, lr=1e-2, num_probes=2, reuse=reuse, **where)
        one, other = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(0))
        for _ in range(5):
            CALLS.clear()
            zo.measure_all([partial(model, one), partial(model, other), partial(model, one)])
            zo.optimizer.step()
        found.append(list(weights(model).values()))
    assert all(a.equal(b) for a, b in zip(*found, strict=True))
    assert {CALLS[str(index)] for index in range(LAYERS - 1)} == {3}
    zo.close()


def test_weights_that_are_unfrozen_in_mid_run_move() -> None:
    def train(reuse: bool) -> list[Tensor]:
        model = net()()
        zo = ZeroOrder(model, lr=1e-2, num_probes=2, reuse=reuse)
        for step in range(8):
            if step == 4:
                model.layers[1].requires_grad_(True)
                zo.cover_new()
            zo.step(lambda: model(torch.ones(4, WIDTH)))
        return list(weights(model).values())

    assert all(a.equal(b) for a, b in zip(train(False), train(True), strict=True))


class Typed(Net):
    """Code that looks at the class of the layers, whose subclasses need a key."""

    class layer(Layer):
        def __init_subclass__(cls, *, key: str) -> None: ...

        def forward(self, x: Tensor) -> Tensor:
            return super(type(self), self).forward(x)

    def through(self, x: Tensor) -> Tensor:
        assert all(type(layer) is Typed.layer for layer in self.layers)
        return super().through(x)


def test_layers_keep_their_class() -> None:
    own = Typed.layer.forward, Layer.forward
    assert compare(net(Typed), num_probes=2).skipped
    assert (Typed.layer.forward, Layer.forward) == own
    inherits = type("Inherits", (Layer,), {})
    assert compare(net(of(inherits)), num_probes=2).skipped
    assert "forward" not in vars(inherits)
    assert not WATCHED
    assert not RUNS


def test_a_record_goes_with_the_last_probe_that_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    init = Run.__init__

    def begun(self: Run, *args: Any) -> None:
        init(self, *args)
        kept.append(self)

    monkeypatch.setattr(Run, "__init__", begun)
    for where in ({}, {"offload": "cpu", "blocks": ["layers"]}):
        compare(net(), num_probes=2, **where)
    assert kept
    assert not any(one.records for one in kept)


class Everything(Net):
    """The results of all layers count (``output_hidden_states``), and are changed in place."""

    def through(self, x: Tensor) -> Tensor:
        states = []
        for layer in self.layers:
            x = layer(x)
            states.append(x)
        total = torch.stack(states).sum(0)
        states[0].mul_(2)
        return total + states[0]


class Residual(Net):
    def through(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Twice(Net):
    """Every layer runs twice, once with a second argument, and the second result is written into."""

    def through(self, x: Tensor) -> Tensor:
        first = super().through(x)
        for layer in self.layers:
            x = layer(x, shift=first).mul_(0.5)
        return x


@pytest.mark.parametrize("offload", [None, "cpu"])
@pytest.mark.parametrize("cls", [Everything, Residual, Twice])
def test_models_that_use_results_in_other_ways(cls: type[nn.Module], offload: str | None) -> None:
    where = {} if offload is None else {"offload": offload, "blocks": ["layers"]}
    found = compare(net(cls), num_probes=2, **where)
    assert found.skipped
    assert not found.off


def test_a_copy_of_the_model_that_a_closure_makes_and_changes_is_computed() -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        value, other = model(x), copy.deepcopy(model)
        other.layers[0].linear.bias.data.add_(1.0)
        assert {type(layer) for layer in other.layers} == {Layer}
        return value + other(x)

    assert compare(net(), loss=loss, num_probes=2).skipped


def test_an_exception_and_a_coroutine_leave_ordinary_layers() -> None:
    model = net()()
    zo = ZeroOrder(model, lr=1e-2, num_probes=2, reuse=True)
    x = torch.randn(4, WIDTH)

    def fails() -> Tensor:
        model(x)
        raise RuntimeError("the closure's own")

    async def waits() -> Tensor:
        return model(x)

    for _ in range(2):
        zo.step(lambda: model(x))
    with pytest.raises(RuntimeError, match="own"):
        zo.step(fails)
    zo.step(waits)
    assert {type(layer) for layer in model.layers} == {Layer}


def test_under_the_trainer(tmp_path: Path) -> None:
    def trained(reuse: bool) -> dict[str, Tensor]:
        model = tiny("llama", layers=3)
        model.requires_grad_(False)
        model.model.layers[-1].requires_grad_(True)
        args = arguments(tmp_path, cls=ZOTrainingArguments, zo_reuse=reuse, gradient_accumulation_steps=2)
        trainer = ZOTrainer(model=model, args=args, train_dataset=texts(16))
        trainer.train()
        assert (trainer.zo.oracle.reuse is None) is not reuse
        return weights(model)

    with skips() as skipped:
        one, other = trained(False), trained(True)
    assert len(skipped) == 2
    assert all(one[name].equal(other[name]) for name in one)
