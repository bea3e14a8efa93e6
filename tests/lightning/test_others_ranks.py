"""Law: the models that Lightning and accelerate test distributed training with learn here, in two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import others_ranks
import pytest
import torch
from processes import torchrun

from zo_core.seedlog import replay

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("others")
    torchrun(Path(others_ranks.__file__), found)
    return found


def of_both(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    first, second = (torch.load(folder / f"{name}{rank}.pt", weights_only=False) for rank in range(2))
    assert first["state"].keys() == second["state"].keys()
    assert all(torch.equal(value, second["state"][key]) for key, value in first["state"].items())
    return first, second


def test_lightnings_boring_model(folder: Path) -> None:
    first, _ = of_both(folder, "lightning")
    assert first["wrapped"] == "Boring"
    model, x = others_ranks.boring(), torch.randn(256, 32)
    before = model.loss(model(x)).item()
    replay(model, next((folder / "lightning").rglob("seedlog.zo")))
    assert all(torch.equal(value, first["state"][key]) for key, value in model.state_dict().items())
    assert model.loss(model(x)).item() < before


def test_accelerates_regression(folder: Path) -> None:
    """It is y = 2 x + 3, with noise of 0.1."""
    first, _ = of_both(folder, "accelerate")
    assert abs(float(first["state"]["a"]) - 2.0) < 0.3
    assert abs(float(first["state"]["b"]) - 3.0) < 0.3
    model = others_ranks.RegressionModel()
    replay(model, folder / "regression.zo")
    assert all(torch.equal(value, first["state"][key]) for key, value in model.state_dict().items())
