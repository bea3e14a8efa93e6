"""Short lives of streamed models, which end in every way that a device must survive, for those who look for races."""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from models import batch, tiny
from torch import Tensor, nn

from zo_core import ZeroOrder

#: Combinations of rule, estimator, noise and number of blocks. Each pair of a rule with an estimator, and of a noise
#: with a number of blocks, is in one of them.
LIVES: list[tuple[str, str, str, int]] = [
    ("sgd", "spsa", "rademacher", 2),
    ("momentum", "spsa", "rademacher", 3),
    ("sign", "spsa", "rademacher", 6),
    ("momentum", "fzoo", "low_rank", 2),
    ("sgd", "fzoo", "low_rank", 3),
    ("momentum", "spsa", "low_rank", 6),
    ("sign", "fzoo", "sparse", 2),
    ("momentum", "fzoo", "sparse", 3),
    ("sgd", "spsa", "sparse", 6),
]


def engine(model: nn.Module, device: str, **settings: Any) -> ZeroOrder:
    return ZeroOrder(model, **{"lr": 1e-3, "offload": "cpu", "device": device, "brake": None, **settings})


def loss_of(model: nn.Module, inputs: dict[str, Tensor], device: str) -> Callable[[], Tensor]:
    """A closure; the model's embeddings are on the device by the time it is called."""
    there = {name: value.to(device) for name, value in inputs.items()}

    def loss() -> Tensor:
        output = model(**there)
        return output if isinstance(output, Tensor) else output.loss

    return loss


class Stack(nn.Module):
    """Like layers, and few operations in each.

    Args:
        layers: how many.
        plan: the order of visits; None for one after the other.
    """

    def __init__(self, layers: int, plan: list[int] | None = None):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(layers))
        self.head = nn.Linear(8, 3)
        self.plan = plan or list(range(layers))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for index in self.plan:
            x = self.layers[index](x)
        return F.cross_entropy(self.head(x.mean(1)), labels)


def whole_life(device: str, layers: int, name: str = "stack", **settings: Any) -> None:
    """Steps, with everything in between that reads or writes streamed weights and momentum."""
    model = Stack(layers) if name == "stack" else tiny(name, layers=layers)
    loss = loss_of(model, batch(name), device)
    zo = engine(model, device, **settings)
    zo.step(loss)
    zo.step(loss)
    with torch.no_grad():
        loss()  # evaluation
    zo.step(loss)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    zo.step(loss)
    checkpoint = copy.deepcopy(zo.state_dict())
    model.load_state_dict(kept)
    zo.step(loss)
    zo.load_state_dict(checkpoint)
    zo.step(loss)
    for parameter in model.parameters():  # the values come when they are read
        parameter.detach().add_(1e-3)
    zo.step(loss)
    zo.flush()
    zo.step(loss)
    zo.close()
    zo.step(loss)


def misses(device: str, **settings: Any) -> None:
    """Every forward visits the layers in another order, some twice: hardly ever is the next one fetched already."""
    model = Stack(7)
    loss = loss_of(model, batch("stack"), device)
    zo = engine(model, device, **settings)
    order = random.Random(0)
    for _ in range(5):
        model.plan = [order.randrange(7) for _ in range(9)]
        zo.step(loss)
        with torch.no_grad():
            loss()
    zo.close()


def loaded(device: str, **settings: Any) -> None:
    """Nobody reads what an evaluation computes before its weights are replaced; two blocks both stay in their slots."""
    model = Stack(2)
    loss = loss_of(model, batch("stack"), device)
    zo = engine(model, device, **settings)
    zo.step(loss)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):
        with torch.no_grad():
            loss()
        model.load_state_dict(kept)
    zo.step(loss)
    zo.close()


def two_stacks(device: str, **settings: Any) -> None:
    """An encoder and a decoder, and two micro-batches in a sweep."""
    model = tiny("t5", layers=3)
    losses = [loss_of(model, batch("t5", index=index), device) for index in range(2)]
    zo = engine(model, device, rule="momentum", **settings)
    for _ in range(3):
        zo.measure_all(losses)
        zo.optimizer.step()
    zo.close()


def partly_resident(device: str, **settings: Any) -> None:
    """Some blocks stay on the device."""
    model = tiny("opt", layers=5)
    loss = loss_of(model, batch("opt"), device)
    zo = engine(model, device, rule="sign", device_memory="150KB", **settings)
    assert zo.streaming is not None
    assert 1 < len(zo.streaming.blocks) < 5
    for _ in range(3):
        zo.step(loss)
    zo.close()


def dropped(device: str, **settings: Any) -> None:
    """Nobody closes the engine, and the block that it has begun to fetch is for nobody."""
    model = tiny("llama", layers=4)
    loss = loss_of(model, batch("llama"), device)
    zo = engine(model, device, rule="momentum", **settings)
    zo.step(loss)
    zo.step(loss)
    del zo, model, loss
    gc.collect()


def moved(device: str, **settings: Any) -> None:
    """Copies begin anew on other streams, with other memory."""
    model = tiny("llama", layers=3)
    loss = loss_of(model, batch("llama"), device)
    zo = engine(model, device, rule="momentum", **settings)
    zo.step(loss)
    zo.step(loss)
    assert zo.streaming is not None
    zo.streaming.compute_on(torch.device(device))
    zo.step(loss)
    zo.close()


OTHERS = {run.__name__: run for run in (misses, loaded, two_stacks, partly_resident, dropped, moved)}


def live(rule: str, estimator: str, noise: str, layers: int, device: str, **more: Any) -> None:
    """One of `LIVES`."""
    probes = {"num_probes": 2} if estimator == "fzoo" else {}
    whole_life(device, layers, rule=rule, estimator=estimator, noise=noise, **probes, **more)


def on_disk(folder: Path) -> dict[str, Any]:
    return {"offload": "disk", "offload_dir": str(folder)}
