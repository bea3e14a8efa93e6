"""Law: processes that open one checkpoint in place share its layers, and train it like one in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from models import batch, tiny
from processes import together
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_zo import from_pretrained_offloaded
from zo_core import ZeroOrder
from zo_core.streaming.shared import SharedStore

STEPS = 3


def test_one_checkpoint_is_opened_by_two_processes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny("llama").save_pretrained(tmp_path / "checkpoint")
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoint").iterdir()}

    def run(rank: int, model: Any) -> tuple[type, dict[str, Tensor]]:
        zo = ZeroOrder(model, lr=1e-3)
        for step in range(STEPS):
            inputs = batch("llama", index=10 * rank + step)
            zo.step(lambda inputs=inputs: model(**inputs).loss)  # type: ignore[misc]
        kind = type(None) if zo.streaming is None else type(zo.streaming.store)
        return kind, {name: value.clone() for name, value in model.state_dict().items()}

    def work(rank: int) -> list[tuple[type, dict[str, Tensor]]]:
        source, folder = tmp_path / "checkpoint", tmp_path / "blocks"
        opened = from_pretrained_offloaded(AutoModelForCausalLM, source, offload_dir=folder)
        return [run(rank, opened), run(rank, AutoModelForCausalLM.from_pretrained(source).eval())]

    for (kind, shared), (_, resident) in together(work, tmp_path / "ranks"):
        assert kind is SharedStore
        assert shared.keys() == resident.keys()
        assert all(torch.equal(shared[name], resident[name]) for name in shared)
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoint").iterdir()} == before
    assert sorted(path.name for path in (tmp_path / "blocks").glob("*.safetensors"))
    assert not list((tmp_path / "blocks" / "rank1").glob("*.safetensors"))
