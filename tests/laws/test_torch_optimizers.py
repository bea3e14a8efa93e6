"""Law: every optimizer that trains with gradients trains with estimates, or is refused before anything moves."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.optim
import pytest
import torch
import transformers.optimization
from torch import nn
from torch.optim import Optimizer

from zo_core import ConfigError, SeedLog, SeedLogWriter, ZeroOrder, ZOOptimizer

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")

Make = Callable[[Any], Optimizer]


def every_class(module: Any) -> list[type[Optimizer]]:
    found = [value for _, value in sorted(vars(module).items()) if isinstance(value, type) and value is not Optimizer]
    return [value for value in found if issubclass(value, Optimizer) and value.__name__ != "LayerWiseDummyOptimizer"]


def variants() -> dict[str, Make]:
    adafactor = transformers.optimization.Adafactor
    result: dict[str, Make] = {}
    for module in (torch.optim, transformers.optimization, bitsandbytes.optim):
        for cls in every_class(module):
            extra = {"momentum": 0.9} if cls.__name__.startswith(("SGD", "LARS", "PytorchLARS")) else {}
            extra |= {"relative_step": False} if cls is adafactor else {}
            name = f"{module.__name__}.{cls.__name__}"
            result[name] = lambda params, cls=cls, extra=extra: cls(params, lr=1e-3, **extra)
    modes: list[dict[str, Any]] = [{}, {"warmup_init": True}, {"scale_parameter": False}, {"beta1": 0.9}]
    modes += [{"weight_decay": 0.1}, {"clip_threshold": 0.5, "decay_rate": -0.5}]
    result |= {f"Adafactor {mode}": lambda params, mode=mode: adafactor(params, **mode) for mode in modes}
    adam: list[dict[str, Any]] = [{"lr": torch.tensor(1e-3)}, {"fused": True}, {"foreach": True}, {"maximize": True}]
    result |= {f"Adam {mode}": lambda params, mode=mode: torch.optim.Adam(params, **mode) for mode in adam}
    result["Adam in groups"] = lambda params: torch.optim.Adam([{"params": [p], "lr": 1e-3} for p in params])
    return result


VARIANTS = variants()
REFUSED = {"torch.optim.LBFGS": "calls the closure itself", "torch.optim.SparseAdam": "accepts only sparse gradients"}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96, bias=False), nn.Tanh(), nn.Linear(96, 64, bias=False))


def loss_of(net: nn.Module) -> Callable[[], torch.Tensor]:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    return lambda: (net(x) - 1).pow(2).mean()


def with_gradients(make: Make) -> str | None:
    """What is wrong with an optimizer itself, here."""
    net = model()
    try:
        optimizer = make(net.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(net)().backward()
            optimizer.step()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize("name", VARIANTS)
def test_an_optimizer_trains_or_is_refused_before_anything_moves(name: str) -> None:
    make, net, start = VARIANTS[name], model(), model()
    optimizer = None if name in REFUSED else with_gradients(make)
    if optimizer is not None:
        pytest.skip(f"it does not work with gradients, either: {optimizer}")
    if name in REFUSED:
        with pytest.raises(ConfigError, match=f"{REFUSED[name]}.*for example torch.optim.AdamW"):
            ZeroOrder(net, optimizer=make(net.parameters()))
        return
    zo = ZeroOrder(net, optimizer=make(net.parameters()))
    records = [zo.step(loss_of(net)) for _ in range(3)]
    assert all(not torch.equal(p, q) and p.isfinite().all() for p, q in zip(net.parameters(), start.parameters()))  # noqa: B905
    own_steps = zo.optimizer.param_groups[0]["lr"] is None
    assert all(math.isnan(record.lr) if own_steps else record.lr == pytest.approx(1e-3) for record in records)


def test_most_optimizers_are_tried() -> None:
    assert len([name for name in VARIANTS if name not in REFUSED and with_gradients(VARIANTS[name]) is None]) > 45


@pytest.mark.parametrize("groups", [1, 2])
def test_a_run_without_a_learning_rate_is_logged_and_resumed(groups: int, tmp_path: Path) -> None:
    def make(net: nn.Module) -> Optimizer:
        params = list(net.parameters())
        return transformers.optimization.Adafactor([{"params": p} for p in params] if groups == 2 else params)

    whole, again = model(), model()
    first, second = (ZeroOrder(net, optimizer=make(net)) for net in (whole, again))
    log = SeedLogWriter.attach(first, tmp_path / "log")
    for _ in range(3):
        first.step(loss_of(whole))
    log.close()
    assert [step.lrs for step in SeedLog.read(tmp_path / "log").steps] == [(0.0,) * groups] * 3
    log = SeedLogWriter.attach(second, tmp_path / "log", follow=True)
    while (entry := log.logged()) is not None:
        second.repeat(entry.probes, entry.loss)
        second.optimizer.step()
    log.close()
    assert second.step_count == 3
    assert all(map(torch.equal, whole.parameters(), again.parameters()))


def test_a_learning_rate_that_is_to_be_found_needs_one_to_replace() -> None:
    net = model()
    zo = ZeroOrder(net, lr="auto", optimizer=transformers.optimization.Adafactor(net.parameters()))
    with pytest.raises(ConfigError, match="Adafactor has no learning rate"):
        zo.step(loss_of(net))
    assert all(map(torch.equal, net.parameters(), model().parameters()))


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
def test_settings_of_torchs_own_optimizers_are_checked_at_once(cls: Any) -> None:
    net = model()
    one, other = net.parameters()
    with pytest.raises(ConfigError, match=rf"lr=None of {cls.__name__} must be a number"):
        ZeroOrder(net, optimizer=cls([{"params": [one]}, {"params": [other], "lr": None}], lr=1e-3))
    with pytest.raises(ConfigError, match="differentiable=True of"):
        ZeroOrder(net, optimizer=cls(net.parameters(), lr=1e-3, differentiable=True))


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "1e-3"])
@pytest.mark.parametrize("name", ["lr", "weight_decay", "eps"])
@pytest.mark.parametrize("late", [False, True], ids=["before the probes", "after them"])
def test_what_a_scheduler_breaks_is_noticed_before_anything_moves(name: str, value: Any, late: bool) -> None:
    net = model()
    one, other = net.parameters()
    zo = ZeroOrder(net, optimizer=ZOOptimizer([{"params": [one]}, {"params": [other]}], lr=1e-3))
    if late:
        zo.measure(loss_of(net))
    zo.optimizer.param_groups[1][name] = value
    with pytest.raises(ConfigError, match=f"{name}={value!r} in the optimizer's param_groups is not a finite number"):
        zo.optimizer.step() if late else zo.step(loss_of(net))
    assert all(map(torch.equal, net.parameters(), model().parameters()))
