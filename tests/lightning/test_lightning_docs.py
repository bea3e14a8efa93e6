"""The loop that the documentation shows for Fabric runs as it stands there, and is a bare loop."""

from __future__ import annotations

import re
from pathlib import Path

import lightning
import pytest
import torch
from hf_helpers import differing, weights
from lightning_helpers import QUIET, loader
from models import tiny

import zo_core

pytestmark = QUIET


def test_the_fabric_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "lightning.md").read_text(encoding="utf-8")
    match = re.search(r"```python\n(fabric = .*?\n)```", text, re.DOTALL)
    assert match is not None
    code = match[1].replace('accelerator="cuda"', 'accelerator="cpu"')
    assert len(code.splitlines()) == 10
    theirs = {"lightning": lightning, "zo_core": zo_core, "model": tiny("llama"), "loader": loader()}
    exec(compile(code, "lightning.md", "exec"), theirs)
    model = tiny("llama")
    zo = zo_core.ZeroOrder(model, lr=1e-6, eps=1e-3)
    for batch in loader():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            zo.measure(lambda batch=batch: model(**batch).loss)
        zo.optimizer.step()
    assert not differing(weights(theirs["model"]), weights(model))
    assert differing(weights(model), weights(tiny("llama")))
    saved = torch.load("checkpoint.ckpt", weights_only=True)
    assert not differing(saved["model"], weights(model))
    assert saved["zo"]["step"] == 6
