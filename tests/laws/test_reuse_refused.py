"""Law: what may not be the same in two probes is computed in each, or found by its loss, and a warning says why."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from reuse_helpers import WIDTH, Layer, Net, compare, net, of, run
from torch import Tensor, nn

from zo_core import ConfigError, Point, ZeroOrder
from zo_core.probing.reuse import PATIENCE, Reuse


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


@pytest.mark.parametrize("offload", [None, "cpu"])
@pytest.mark.parametrize(
    "cls", [of(Counts), of(Writes), of(Views), WithObject, Pairs], ids=["counts", "writes", "views", "object", "pairs"]
)
def test_layers_that_do_more_than_return_a_result_run_in_each_probe(
    cls: type[nn.Module], offload: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    where = {} if offload is None else {"offload": offload, "blocks": ["layers"]}
    assert not compare(net(cls), num_probes=2, **where).skipped
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
    assert not compare(net(Lists), num_probes=2, **where).skipped
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

    assert not compare(net(), loss=loss, num_probes=2).skipped
    assert "a hook of all modules is registered" in caplog.text


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
        assert compare(net(cls), num_probes=2, **where).off
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
    assert compare(model, num_probes=2, **where).off
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
