"""Law: a momentum that changes inside of a low-rank window counts, and is in the log."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_helpers import QUIET, Wrapped, loader, trainer
from torch import Tensor, nn
from traces import same_bits

from zo_core import LowRank, Momentum, SeedLogWriter, ZeroOrder, replay

pytestmark = QUIET
WINDOW = LowRank(refresh=4)


class Narrow(nn.Module):
    """Layers without biases: all that moves waits for the end of a window."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.pow(2).mean()


def run(zo: ZeroOrder, start: int, stop: int) -> None:
    for step in range(start, stop):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        zo.step(lambda x=x: zo.model(x))


def final(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_a_momentum_that_changes_inside_of_a_window_counts_and_replays(tmp_path: Path, offload: str | None) -> None:
    ends = []
    for betas in ((0.9,) * 8, (0.9, 0.9, 0.1, 0.5, 0.9, 0.2, 0.2, 0.9)):
        model = Narrow()
        start = copy.deepcopy(model)
        zo = ZeroOrder(model, lr=1e-2, eps=1e-2, noise=WINDOW, rule="momentum", offload=offload)
        log = SeedLogWriter.attach(zo, tmp_path / f"{betas[2]}.zo")
        for step, beta in enumerate(betas):
            zo.flush()
            zo.rule = Momentum(beta)
            run(zo, step, step + 1)
        log.close()
        zo.close()
        replay(start, tmp_path / f"{betas[2]}.zo")
        ends.append(final(model))
        assert same_bits(final(start), ends[-1])
    assert not any(torch.equal(ends[0][name], value) for name, value in ends[1].items())


def test_lightning_s_schedules_of_the_momentum_reach_matrices(tmp_path: Path) -> None:
    def cycled(module: nn.Module) -> Any:
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=7, cycle_momentum=cycles)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    ends = []
    for cycles in (False, True):
        module = Wrapped(optimizer=cycled)
        run_ = trainer(tmp_path / str(cycles), {"noise": WINDOW})
        run_.fit(module, loader())
        ends.append(final(module))
        base = Wrapped()
        replay(base, run_.strategy.log_path)
        assert same_bits(final(base), ends[-1])
    moved = [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])]
    assert any(ends[0][name].ndim > 1 for name in moved)
