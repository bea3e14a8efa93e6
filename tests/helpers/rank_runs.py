"""What processes train in tests of several, and how their weights compare."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from processes import together
from torch import Tensor, nn

from zo_core import ZeroOrder

State = dict[str, Tensor]


def model_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * rank + step)
    inputs = torch.randn(8, 6, generator=generator)
    return inputs, inputs.argmax(1) % 4


def loss(model: nn.Module, rank: int, step: int) -> Tensor:
    inputs, labels = batch(rank, step)
    return F.cross_entropy(model(inputs), labels)


def state(model: nn.Module) -> State:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def both(tmp_path: Path, work: Callable[[int], Any], **how: Any) -> tuple[Any, Any]:
    first, second = together(work, tmp_path, **how)
    return first, second


def accumulate(zo: ZeroOrder, model: nn.Module, step: int) -> None:
    """A step of one process on the batches of two, with half of each loss."""
    for rank in range(2):
        zo.measure(lambda rank=rank: loss(model, rank, step) / 2)  # type: ignore[misc]
    zo.optimizer.step()
