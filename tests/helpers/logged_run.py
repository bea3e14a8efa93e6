"""A short run with a seed log, for the laws on logs and on their command."""

from __future__ import annotations

from pathlib import Path

import torch
from models import closure, tiny
from traces import weights

from zo_core import SeedLogWriter, ZeroOrder

STEPS = 5
LR = 1e-2

#: The log's path, and the weights at each step.
LoggedRun = tuple[Path, list[dict[str, torch.Tensor]]]


def logged_run(path: Path) -> LoggedRun:
    """A log with changes in it, and the weights at each step."""
    torch.set_num_threads(1)
    zo = ZeroOrder(tiny("mlp"), lr=LR)
    log = SeedLogWriter.attach(zo, path)
    seen = [weights(zo.model)]
    for index in range(STEPS):
        zo.optimizer.param_groups[0]["weight_decay"] = 0.5 * (index > 2)
        zo.step(closure("mlp", zo.model, index))
        seen.append(weights(zo.model))
    log.close()
    return path, seen
