"""Law: layers that do not move are computed once for several probes, and every number is as if each computed them."""

from __future__ import annotations

import copy
import logging
import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import arguments, texts
from models import FAMILIES, closure, tiny
from torch import Tensor, nn
from traces import weights

from hf_zo import ZOTrainer, ZOTrainingArguments
from zo_core import ESTIMATORS, ConfigError, Point, ZeroOrder
from zo_core.probing.reuse import PATIENCE, RUNS, WATCHED, Reuse, Run
from zo_core.stand_ins import same_bits

WIDTH, LAYERS = 6, 5
CALLS: Counter[str] = Counter()


class Layer(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.linear, self.dropout = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Any:
        CALLS[self.name] += 1
        x = self.dropout(self.linear(x).tanh())
        return x if shift is None else x + shift


class Net(nn.Module):
    """Layers in a row; subclasses use them in other ways."""

    layer: type[nn.Module] = Layer

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(self.layer(str(index)) for index in range(LAYERS))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.through(self.embed(x))).pow(2).mean()

    def through(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def late(model: nn.Module) -> None:
    """Freezes all but the last layer and the head."""
    model.requires_grad_(False)
    model.layers[-1].requires_grad_(True)
    model.head.requires_grad_(True)


def run(
    model: nn.Module, reuse: bool, steps: int = 7, loss: Callable[[Any, Tensor], Any] | None = None, **settings: Any
) -> tuple[list[Any], Any]:
    """Every number that a run gives, and what decided about its layers."""
    zo = ZeroOrder(model, reuse=reuse, **{"lr": 1e-2, "eps": 1e-2, "seed": 3, "brake": None, **settings})
    torch.manual_seed(1)
    random.seed(1)
    batches, numbers = torch.randn(steps, 4, WIDTH, generator=torch.Generator().manual_seed(2)), []
    for step, x in enumerate(batches):
        record = zo.step(lambda x=x: model(x) if loss is None else loss(model, x))
        numbers += [torch.tensor([record.loss, record.projected_grad, random.random()]), torch.get_rng_state()]
        if step % 3 == 1:
            with torch.no_grad():
                numbers.append(model(x))
    reuse_of = zo.oracle.reuse
    zo.close()
    return [*numbers, *(value.clone() for value in model.state_dict().values())], reuse_of


def compare(make: Callable[[], nn.Module], **settings: Any) -> Any:
    """Asserts that runs with and without reuse are equal; returns what decided about the layers."""
    one, _ = run(make(), False, **settings)
    other, found = run(make(), True, **settings)
    assert len(one) == len(other)
    assert [i for i, (a, b) in enumerate(zip(one, other, strict=True)) if not same_bits(a, b)] == []
    return found


def net(cls: type[nn.Module] = Net, freeze: Callable[[nn.Module], None] | None = late) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = cls()
        if freeze is not None:
            freeze(model)
        return model

    return make


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
    reuse = compare(net(freeze=None), noise=noise, num_probes=many, dropout=True, steps=12, **where)
    assert reuse.trusted
    assert not reuse.off


@pytest.mark.parametrize("offload", [None, "cpu"])
@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "forward_grad"])
def test_every_estimator(name: str, offload: str | None) -> None:
    where = {} if offload is None else {"offload": offload, "blocks": ["layers"]}
    for settings in ({}, {"dropout": True, "rule": "momentum", "weight_decay": 0.1}):
        settings = {} if name == "conservative" else settings
        reuse = compare(net(), estimator=name, num_probes=3, **settings, **where)
        assert reuse.trusted


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
    def trained(reuse: bool) -> tuple[list[Tensor], ZeroOrder]:
        model = tiny(name, layers=3)
        model.config.use_cache = False
        model.train()
        zo = ZeroOrder(model, lr=1e-3, noise="one_block", num_probes=2, dropout=True, seed=1, reuse=reuse)
        torch.manual_seed(0)
        losses = [torch.tensor(zo.step(closure(name, model, step)).loss) for step in range(9)]
        return [*losses, torch.get_rng_state(), *model.state_dict().values()], zo

    (one, _), (other, zo) = trained(False), trained(True)
    assert all(a.equal(b) for a, b in zip(one, other, strict=True))
    assert zo.oracle.reuse.trusted


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


def test_settings_with_which_nothing_can_be_reused_are_errors(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match="forward_grad"):
        ZeroOrder(net()(), reuse=True, estimator="forward_grad")
    with pytest.raises(ConfigError, match="stack_probes"):
        ZeroOrder(net()(), reuse=True, stack_probes=True, noise="low_rank")
    with pytest.raises(ConfigError, match="repeated layers"):
        ZeroOrder(nn.Linear(2, 2), reuse=True)
    with pytest.raises(ConfigError, match="True or False"):
        ZeroOrder(net()(), reuse="yes")
    assert ZeroOrder(net()()).oracle.reuse is None


def test_a_warning_says_why_nothing_is_reused(caplog: pytest.LogCaptureFixture) -> None:
    model = net(freeze=lambda model: (model.requires_grad_(False), model.embed.requires_grad_(True)))()
    zo = ZeroOrder(model, lr=1e-2, reuse=True)
    for _ in range(PATIENCE + 2):
        zo.step(lambda: model(torch.ones(4, WIDTH)))
    assert caplog.text.count("something before the layers, has moved in every step so far") == 1


# What must not be reused


class Counts(Layer):
    """Keeps something from forward to forward."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return super().forward(x) + self.count


class Writes(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(super().forward(x))


class Views(Layer):
    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        return x.view_as(x)


class Takes(Layer):
    """Is called with an object, as with a cache of keys and values."""

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        return super().forward(x)


class WithObject(Net):
    layer = Takes

    def through(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, cache=object())
        return x


class Pairs(Net):
    """Layers pass on one argument as it is."""

    class layer(Layer):
        def forward(self, state: tuple[Tensor, dict[str, Tensor]]) -> Any:
            x, shift = state
            return super().forward(x, shift["by"]), shift

    def through(self, x: Tensor) -> Tensor:
        state = x, {"by": x.sin()}
        for layer in self.layers:
            state = layer(state)
        return state[0] * state[1]["by"]


def of(layer_class: type[nn.Module]) -> type[Net]:
    return type("Of", (Net,), {"layer": layer_class})


@pytest.mark.parametrize("offload", [None, "cpu"])
@pytest.mark.parametrize(
    "cls", [of(Counts), of(Writes), of(Views), WithObject], ids=["counts", "writes", "views", "object"]
)
def test_layers_that_do_more_than_return_a_result_run_in_each_probe(
    cls: type[nn.Module], offload: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    where = {} if offload is None else {"offload": offload, "blocks": ["layers"]}
    trusted = compare(net(cls), num_probes=2, **where).trusted
    assert trusted == set()
    assert "are computed for each probe, because" in caplog.text


class Shares(Net):
    """Layers report to a list of the model, which the loss empties again."""

    class layer(Layer):
        said: list[Tensor] = []  # noqa: RUF012

        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            self.said.append(x.mean())
            return x

    def through(self, x: Tensor) -> Tensor:
        x = super().through(x)
        said = torch.stack(self.layer.said)
        self.layer.said.clear()
        return x + said.sum()


class Elsewhere(Net):
    """The first layer computes with the weight of the head, where nobody sees it but by the loss."""

    class layer(Layer):
        head: list[nn.Module] = []  # noqa: RUF012

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.head[-1].weight

    def __init__(self) -> None:
        super().__init__()
        self.layer.head.append(self.head)


class Lists(Net):
    """Layers append to a list that they are called with."""

    class layer(Layer):
        def forward(self, x: Tensor, said: list[Tensor]) -> Tensor:
            x = super().forward(x)
            said.append(x.mean())
            return x

    def through(self, x: Tensor) -> Tensor:
        said: list[Tensor] = []
        for layer in self.layers:
            x = layer(x, said)
        return x


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_layers_that_write_into_a_list_run_in_each_probe(offload: str | None, caplog: pytest.LogCaptureFixture) -> None:
    where = {} if offload is None else {"offload": offload, "blocks": ["layers"]}
    assert not compare(net(Lists), num_probes=2, **where).trusted
    assert "writes into its arguments" in caplog.text


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_weights_of_another_module_are_seen_while_they_do_not_move(
    offload: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    where = {} if offload is None else {"offload": offload, "blocks": ["layers"]}
    for seed in range(3):
        freeze: Any = lambda model: model.embed.requires_grad_(False)  # noqa: E731
        compare(net(Elsewhere, freeze), noise="one_block", num_probes=1, seed=seed, steps=20, **where)
    assert "uses weights of another module" in caplog.text


class Remembers(Net):
    """Layers keep something in a list from a certain step on, and the loss uses it."""

    class layer(Layer):
        def __init__(self, name: str) -> None:
            super().__init__(name)
            self.on, self.said = [False], []

        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            if self.on[0]:
                self.said[:] = [x.mean()]
            return x


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_layers_that_begin_to_keep_something(offload: str | None) -> None:
    where = {} if offload is None else {"offload": offload, "blocks": ["layers"]}

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        on = bool(x.sum() > 0)
        for layer in model.layers:
            layer.on[0] = on
        value = model(x)
        return value + sum(sum(layer.said) for layer in model.layers) if on else value

    compare(net(Remembers), loss=loss, num_probes=2, steps=12, **where)


def test_a_hook_of_all_modules_runs_in_each_probe(caplog: pytest.LogCaptureFixture) -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        seen: list[Tensor] = []
        hook = nn.modules.module.register_module_forward_hook(lambda _m, _a, out: seen.append(out.mean()))
        try:
            return model(x) + torch.stack(seen).sum()
        finally:
            hook.remove()

    assert not compare(net(), loss=loss, num_probes=2).trusted
    assert "a hook of all modules is registered" in caplog.text


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
    assert compare(net(Typed), num_probes=2).trusted
    assert (Typed.layer.forward, Layer.forward) == own
    inherits = type("Inherits", (Layer,), {})
    assert compare(net(of(inherits)), num_probes=2).trusted
    assert "forward" not in vars(inherits)
    assert not WATCHED
    assert not RUNS


def test_what_begins_to_matter_is_found_by_a_later_check() -> None:
    model = net()()
    original = Layer.forward
    zo = ZeroOrder(model, lr=1e-2, num_probes=2, reuse=True)
    matters: list[Tensor] = []

    def forward(self: Any, x: Tensor) -> Tensor:
        matters.append(x.mean())
        return original(self, x)

    Layer.forward = forward  # type: ignore[assignment]
    try:
        for step in range(12):

            def loss(step: int = step) -> Tensor:
                matters.clear()
                return model(torch.ones(4, WIDTH)) + (len(matters) if step > 3 else 0)

            zo.step(loss)
    finally:
        Layer.forward = original  # type: ignore[method-assign]
    assert "has another loss" in zo.oracle.reuse.off


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


def enables_gradients(*_: Any) -> None:
    torch.set_grad_enabled(True)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda layer: setattr(layer, "forward", layer.forward), "has a forward that is not a method"),
        (lambda layer: layer.register_forward_pre_hook(enables_gradients), "enables gradients"),
    ],
)
def test_a_warning_names_the_real_reason(make: Any, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    model = net()()
    for layer in model.layers:
        make(layer)
    zo = ZeroOrder(model, lr=1e-2, num_probes=2, reuse=True)
    for _ in range(PATIENCE + 2):
        with torch.no_grad():
            zo.step(lambda: model(torch.ones(4, WIDTH)))
    assert reason in caplog.text
    assert "has moved in every step" not in caplog.text


@pytest.mark.parametrize(("cls", "offload"), [(Shares, None), (Elsewhere, None), (Elsewhere, "cpu")])
def test_hidden_ways_between_layers_are_found_by_their_loss(
    cls: type[nn.Module], offload: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    where = {} if offload is None else {"offload": offload, "blocks": ["layers"]}
    with caplog.at_level(logging.WARNING):
        reuse = compare(net(cls), num_probes=2, **where)
    assert not reuse.trusted
    assert "reuse=True has no effect any more" in caplog.text


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_a_layer_that_moves_is_never_taken_from_another_probe(
    offload: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    where = {} if offload is None else {"offload": offload, "blocks": ["layers"]}
    model = net(freeze=None)()
    zo = ZeroOrder(model, reuse=True)
    assert zo.oracle.reuse.count(Point(1, 1e-3)) == zo.oracle.reuse.count(Point(1, 0.0)) == 0
    monkeypatch.setattr(Reuse, "rests", lambda *_: True)  # a fault in the choice of layers
    model = net(freeze=lambda model: (model.requires_grad_(False), model.layers.requires_grad_(True)))
    reuse = compare(model, num_probes=2, **where)
    assert not reuse.trusted
    assert "reuse=True has no effect any more" in caplog.text


def test_a_hook_within_a_layer_sees_every_probe() -> None:
    seen: dict[bool, list[Tensor]] = {False: [], True: []}
    for reuse, found in seen.items():
        model = net()()
        hook: Any = lambda _m, _a, out, found=found: found.append(out.clone())  # noqa: E731
        model.layers[1].linear.register_forward_hook(hook)
        run(model, reuse, num_probes=2)
    last = [torch.stack(found[-4:]) for found in seen.values()]
    assert last[0].equal(last[1])


# Other uses of the results


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
    reuse = compare(net(cls), num_probes=2, **where)
    assert reuse.trusted
    assert not reuse.off


def test_a_copy_of_the_model_that_a_closure_makes_and_changes_is_computed() -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        value, other = model(x), copy.deepcopy(model)
        other.layers[0].linear.bias.data.add_(1.0)
        assert {type(layer) for layer in other.layers} == {Layer}
        return value + other(x)

    assert compare(net(), loss=loss, num_probes=2).trusted


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
    def trained(reuse: bool) -> tuple[dict[str, Tensor], Any]:
        model = tiny("llama", layers=3)
        model.requires_grad_(False)
        model.model.layers[-1].requires_grad_(True)
        args = arguments(tmp_path, cls=ZOTrainingArguments, zo_reuse=reuse, gradient_accumulation_steps=2)
        trainer = ZOTrainer(model=model, args=args, train_dataset=texts(16))
        trainer.train()
        return weights(model), trainer.zo.oracle.reuse

    (one, nothing), (other, reuse) = trained(False), trained(True)
    assert nothing is None
    assert len(reuse.trusted) == 2
    assert all(one[name].equal(other[name]) for name in one)
