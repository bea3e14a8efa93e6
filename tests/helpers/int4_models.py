"""Small models that bitsandbytes has quantised to 4 bits, with a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

WIDTH, CLASSES = 64, 5


class Block(nn.Module):
    def __init__(self, **quantisation: Any):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = Linear4bit(WIDTH, 2 * WIDTH, **quantisation)
        self.down = Linear4bit(2 * WIDTH, WIDTH, bias=False, **quantisation)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Quantised(nn.Module):
    """Three blocks of two 4-bit layers each, between float layers."""

    def __init__(self, nested: bool = True, kind: str = "nf4", compute: torch.dtype | None = None, blocksize: int = 64):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            settings = {"compress_statistics": nested, "quant_type": kind, "compute_dtype": compute}
            self.embed = nn.Linear(8, WIDTH)
            self.blocks = nn.ModuleList(Block(**settings) for _ in range(3))
            self.head = nn.Linear(WIDTH, CLASSES)
        for layer in layers(self):
            layer.weight.blocksize = blocksize
        self.to("cpu")  # which quantises

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        hidden = self.embed(x)
        for block in self.blocks:
            hidden = block(hidden)
        return F.cross_entropy(self.head(hidden), labels)


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def scales(model: nn.Module) -> list[Tensor]:
    """Copies of the current scales."""
    return [layer.weight.quant_state.absmax.clone() for layer in layers(model)]


def codes(model: nn.Module) -> list[Tensor]:
    return [layer.weight.data.clone() for layer in layers(model)]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def closure(model: nn.Module, index: int = 0) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(6, 8, generator=generator)
    labels = torch.randint(0, CLASSES, (6,), generator=generator)
    return lambda: model(x, labels)
