"""Engines that measure the probes of a step in one forward, for the laws on stacking."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models import batch, closure, gpt2, tiny
from torch import Tensor, nn

from zo_core import LowRank, ZeroOrder

NOISE = LowRank(refresh=3)


def engine(model: nn.Module, **settings: Any) -> ZeroOrder:
    return ZeroOrder(
        model, **{"noise": NOISE, "num_probes": 3, "lr": 1e-4, "seed": 5, "stack_probes": True, **settings}
    )


def made(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    if name != "gpt2":
        return tiny(name, dtype=dtype)
    torch.manual_seed(0)
    return gpt2()[0].to(dtype)


def loss_of(name: str, model: nn.Module, index: int = 0) -> Callable[[], Tensor]:
    if name != "gpt2":
        return closure(name, model, index)
    inputs = batch("llama", index=index)
    return lambda: model(**inputs).loss


def run(zo: ZeroOrder, name: str, steps: int) -> list[dict[str, Any]]:
    return [zo.step(loss_of(name, zo.model, zo.step_count)).as_dict() for _ in range(steps)]
