"""Engines with masks, and their runs."""

from __future__ import annotations

from typing import Any

from models import closure
from torch import nn

from zo_core import StepRecord, ZeroOrder

ALL: dict[str, Any] = {"rule": "momentum", "num_probes": 2, "weight_decay": 0.1}


def engine(model: nn.Module, noise: Any = "sparse", **settings: Any) -> ZeroOrder:
    return ZeroOrder(model, **{"noise": noise, "lr": 1e-2, "eps": 1e-2, "seed": 5, **settings})


def run(zo: ZeroOrder, steps: int, name: str = "llama") -> list[StepRecord]:
    return [zo.step(closure(name, zo.model, zo.step_count)) for _ in range(steps)]
