"""Laws of several processes that train quantisation scales: these are compared and exchanged as weights are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import int4_models
import pytest
import torch
import torchao_models
from rank_runs import both
from torch import Tensor, nn

from zo_core import ZeroOrder


def of_bitsandbytes(model: nn.Module) -> list[Tensor]:
    return [layer.weight.quant_state.absmax for layer in int4_models.layers(model)]


def of_torchao(model: nn.Module) -> list[Tensor]:
    return [weight.scale for weight in torchao_models.quantised(model)]


LIBRARIES: list[tuple[Any, Callable[[nn.Module], list[Tensor]]]] = [
    (int4_models, of_bitsandbytes),
    (torchao_models, of_torchao),
]


@pytest.mark.parametrize(("library", "scales_of"), LIBRARIES, ids=["bitsandbytes", "torchao"])
def test_all_processes_begin_with_the_scales_of_rank_0(
    tmp_path: Path, library: Any, scales_of: Callable[[nn.Module], list[Tensor]]
) -> None:
    def run(rank: int, factor: float) -> list[Tensor]:
        model = library.Quantised()
        zo = ZeroOrder(model, lr=1e-2, eps=1e-2, seed=3)
        with torch.no_grad():
            for scales in scales_of(model):
                scales *= factor
        for index in range(3):
            zo.step(library.closure(model, index + 10 * rank))
        return [scales.clone() for scales in scales_of(model)]

    first, second = both(tmp_path, lambda rank: [run(rank, 1.0), run(rank, 1.5 if rank else 1.0)])
    assert not library.equal(first[0], scales_of(library.Quantised()))
    for found in (first[1], *second):
        assert library.equal(found, first[0])
