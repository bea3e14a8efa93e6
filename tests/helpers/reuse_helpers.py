"""Models of repeated layers, and runs of them with and without ``reuse`` that are compared."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zo_core import ZeroOrder
from zo_core.probing.reuse import Reuse
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


@contextmanager
def skips() -> Iterator[set[nn.Module]]:
    """A context that yields the layers of which a probe has used the result of another one."""
    seen, due = set[nn.Module](), Reuse.due

    def watched(self: Reuse, skipped: set[nn.Module]) -> bool:
        seen.update(skipped)
        return due(self, skipped)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reuse, "due", watched)
        yield seen


@dataclass
class Found:
    """What a run with reuse has done.

    Attributes:
        off: why it reuses nothing any more; empty if it does.
        skipped: the layers of which a probe has used the result of another one.
    """

    off: str
    skipped: set[nn.Module]


def run(
    model: nn.Module, reuse: bool, steps: int = 7, loss: Callable[[Any, Tensor], Any] | None = None, **settings: Any
) -> tuple[list[Any], str]:
    """Every number that a run gives, and why it reuses nothing any more."""
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
    off = zo.oracle.reuse.off if reuse else ""
    zo.close()
    return [*numbers, *(value.clone() for value in model.state_dict().values())], off


def compare(make: Callable[[], nn.Module], **settings: Any) -> Found:
    """Asserts that runs with and without reuse are equal; returns what the latter has done."""
    one, _ = run(make(), False, **settings)
    with skips() as skipped:
        other, off = run(make(), True, **settings)
    assert len(one) == len(other)
    assert [i for i, (a, b) in enumerate(zip(one, other, strict=True)) if not same_bits(a, b)] == []
    return Found(off, skipped)


def net(cls: type[nn.Module] = Net, freeze: Callable[[nn.Module], None] | None = late) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = cls()
        if freeze is not None:
            freeze(model)
        return model

    return make


def of(layer_class: type[nn.Module]) -> type[Net]:
    return type("Of", (Net,), {"layer": layer_class})
