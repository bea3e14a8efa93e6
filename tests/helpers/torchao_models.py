"""Small models that torchao has quantised, with a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

WIDTH, CLASSES = 64, 5
GROUPS = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
ROWS = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerAxis(0))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Quantised(nn.Module):
    """Two blocks of two quantised layers each, between float layers."""

    def __init__(self, scheme: Any = GROUPS, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.Linear(8, WIDTH)
            self.blocks = nn.ModuleList(Block() for _ in range(2))
            self.head = nn.Linear(WIDTH, CLASSES)
        self.to(dtype)
        quantize_(self.blocks, scheme)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        hidden = self.embed(x.to(self.embed.weight.dtype))
        for block in self.blocks:
            hidden = block(hidden)
        return F.cross_entropy(self.head(hidden), labels)


def closure(model: nn.Module, index: int = 0) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(6, 8, generator=generator)
    labels = torch.randint(0, CLASSES, (6,), generator=generator)
    return lambda: model(x, labels)


def quantised(model: nn.Module) -> list[Any]:
    return [p for p in model.parameters() if hasattr(p, "qdata")]


def parts(model: nn.Module, name: str) -> list[Tensor]:
    """Copies of one part of all quantised weights."""
    return [getattr(weight, name).clone() for weight in quantised(model)]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def plain(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all that a state dict has, quantised weights in their parts."""
    result: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        names = value.__tensor_flatten__()[0] if hasattr(value, "qdata") else []
        result |= {f"{name}.{part}": getattr(value, part).clone() for part in names} or {name: value.clone()}
    return result
