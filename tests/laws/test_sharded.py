"""Law: a model whose parts each process gathers for its forwards is an error that says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from processes import together
from torch import nn

from zo_core import ModelError, ZeroOrder


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4), nn.Linear(4, 4))


def refused(build: Callable[[], nn.Module], **settings: str) -> str:
    try:
        ZeroOrder(build(), lr=1e-2, **settings)
    except ModelError as error:
        return str(error)
    return "nothing"


def test_parts_of_a_model_are_refused(tmp_path: Path) -> None:
    def work(rank: int) -> list[str]:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

        mesh = init_device_mesh("cpu", (2,))
        return [
            refused(lambda: fully_shard(net(), mesh=mesh)),
            refused(lambda: FullyShardedDataParallel(net(), device_id=torch.device("cpu"))),
            refused(net),
        ]

    for sharded, wrapped, whole in together(work, tmp_path):
        assert "fully_shard has dealt out the parameters of the model" in sharded
        assert "the model is wrapped in FullyShardedDataParallel" in wrapped
        assert all("offload='cpu'" in each for each in (sharded, wrapped))
        assert whole == "nothing"
    assert refused(net) == "nothing"


def test_weights_that_deepspeed_deals_out_are_refused() -> None:
    model = net()
    model[0].weight.ds_id = 0
    assert "parameter '0.weight' is dealt out to the processes by DeepSpeed" in refused(lambda: model)
