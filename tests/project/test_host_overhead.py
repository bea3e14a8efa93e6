"""The benchmark of the host's part measures steps in which nothing moves, and leaves the noise as it was."""

from __future__ import annotations

import pytest
import torch

from benchmarks.host_overhead import COLUMNS, main, model_of, without_noise
from zo_core import ZeroOrder
from zo_core.noise import Direction


def test_it_prints_a_row_per_depth(capsys: pytest.CaptureFixture[str]) -> None:
    before = Direction.add_to
    main(["--layers", "2", "3", "--repeats", "2"])
    assert Direction.add_to is before
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    cells = [line.strip("| ").split(" | ") for line in lines]
    assert cells[0] == COLUMNS
    assert [row[0] for row in cells[2:]] == ["2", "3"]
    assert all(float(row[index]) > 0 for row in cells[2:] for index in (1, 5, 6))  # times, not differences of times


def test_without_noise_probes_agree_and_weights_stay() -> None:
    model = model_of(2)
    ids = torch.arange(8)[None]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with without_noise():
        record = ZeroOrder(model, lr=1.0).step(lambda: model(input_ids=ids, labels=ids).loss)
    assert record.projected_grad == 0.0
    assert all(map(torch.equal, before, model.parameters()))
