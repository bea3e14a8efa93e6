"""A model around something that is not torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Around(nn.ModuleDict):
    """Trainable parts before and after something that is not torch."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            {"before": nn.Linear(3, 4), "after": nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))}
        )


INPUTS = torch.linspace(-1, 1, 12).view(4, 3)


def service(numbers: list[list[float]]) -> list[list[float]]:
    """Knows nothing of torch, and does nothing that a gradient would follow."""
    return [[round(2 * value) / 2 for value in row] for row in numbers]


def plain(model: Around) -> float:
    answer = service(model["before"](INPUTS).tolist())
    return (model["after"](torch.tensor(answer)) - 1).square().mean().item()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())
