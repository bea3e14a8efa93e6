"""Law: probes that take turns have their own random numbers and modes, whenever a run begins to use them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from offload_helpers import deep
from torch import Tensor, nn

from zo_core import ZeroOrder
from zo_core.modes import GENERATORS

STEPS, BEGINS = 5, 3


def by_torch(model: nn.Module) -> float:
    return torch.rand(()).item()


def by_numpy(model: nn.Module) -> float:
    return float(np.random.rand())


def by_python(model: nn.Module) -> float:
    return random.random()


def by_mode(model: nn.Module) -> float:
    """Counts in the mode of a layer how many probes have been here."""
    layer = model.model.layers[0].mlp
    layer.training = not layer.training
    return 1.0 + layer.training


def run(offload: str | None, draw: Callable[[Any], float], begins: int) -> tuple[list[float], int, list[bytes]]:
    model, inputs = deep()
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    calls = 0
    factors: list[float] = []

    def in_a_layer(module: nn.Module, args: Any, output: Any) -> Any:
        return output if zo.step_count < begins else output * (1.0 + 0.1 * draw(model))

    for layer in model.model.layers:
        layer.mlp.register_forward_hook(in_a_layer)

    def loss() -> Tensor:
        nonlocal calls
        calls += 1
        found: Tensor = model(**inputs).loss
        return found

    zo = ZeroOrder(model, lr=1e-3, offload=offload, dropout=True)
    for _ in range(STEPS):
        record = zo.step(loss)
        factors += [record.loss, record.projected_grad]
    zo.close()
    state = [p.detach().numpy().tobytes() for p in model.parameters()]
    return [*factors, torch.rand(()).item(), np.random.rand(), random.random()], calls, state


@pytest.mark.parametrize("draw", [by_torch, by_numpy, by_python, by_mode])
@pytest.mark.parametrize("begins", [0, BEGINS])
def test_probes_in_turns_draw_what_probes_by_themselves_draw(draw: Callable[[Any], float], begins: int) -> None:
    streamed, resident = run("cpu", draw, begins), run(None, draw, begins)
    assert streamed[0] == resident[0]
    assert streamed[2] == resident[2]
    # A sweep whose end shows for the first time that something has moved is done again.
    assert streamed[1] == resident[1] + (2 if begins and draw in (by_numpy, by_python) else 0)


def test_quiet_probes_exchange_no_random_states(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = deep()
    zo = ZeroOrder(model, lr=1e-3, offload="cpu")
    zo.step(lambda: model(**inputs).loss)
    asked: list[str] = []
    for kind, generators in GENERATORS.items():
        watched = replace(generators, get=lambda kind=kind, get=generators.get: (asked.append(kind), get())[1])
        monkeypatch.setitem(GENERATORS, kind, watched)
    zo.step(lambda: model(**inputs).loss)
    assert zo.oracle.own.moving == set()
    zo.close()
    assert asked.count("numpy") == asked.count("python") < 5 < len(model.model.layers) <= asked.count("torch")
