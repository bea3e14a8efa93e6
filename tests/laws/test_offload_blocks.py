"""What is where while a model is streamed: blocks that come and go, and those that stay."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from offload_helpers import LAYERS, SOME, assert_equal, deep, in_memory, make, train

from zo_core import ZeroOrder

pytestmark = pytest.mark.usefixtures("no_probe_thread_is_left")


def test_evicted_parameters_keep_shape_and_count_and_are_nan() -> None:
    model, _ = make("llama")
    shapes = {name: p.shape for name, p in model.named_parameters()}
    zo = ZeroOrder(model, offload="cpu")
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    for block in zo.streaming.blocks:
        for holders in block.holders.values():
            assert bool(in_memory(holders[0]).isnan().all())


def test_a_step_writes_each_block_once_and_reads_it_once() -> None:
    model, inputs = make("llama")
    zo = ZeroOrder(model, offload="cpu", num_probes=2)
    zo.streaming.slots = 1  # so that no block can stay from one sweep to the next
    for _ in range(3):
        zo.step(lambda: model(**inputs).loss)
    zo.flush()
    size = sum(block.nbytes for block in zo.streaming.blocks)
    assert zo.streaming.bytes_written == 3 * size
    assert zo.streaming.bytes_read <= 5 * size  # the first step has a sweep more, and the flush


@pytest.mark.parametrize("settings", [{"offload": "auto"}, {"offload": "cpu"}, {"offload": "disk"}], ids=str)
@pytest.mark.parametrize("memory", [None, SOME, "1GB", 1])
def test_what_fits_stays_and_the_rest_is_streamed(memory: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    expected = train(*deep(), None, tmp_path)
    model, _ = deep()
    zo = ZeroOrder(model, offload=settings["offload"], device_memory=memory)
    count = 0 if zo.streaming is None else len(zo.streaming.blocks)
    resident = sum(p.numel() * 4 for p in {id(p): p for p in model.parameters()}.values())
    if memory == "1GB" or (memory is None and settings["offload"] == "auto"):
        assert count == 0
    elif memory == SOME:
        assert 0 < count < LAYERS
        assert zo.streaming is not None
        streamed = sum(block.nbytes for block in zo.streaming.blocks)
        arena = zo.streaming.slots * zo.streaming.slot_bytes
        largest = max(block.nbytes for block in zo.streaming.blocks)
        # What stays and the arena are within the limit, and one more block would not have been.
        assert resident - streamed + arena <= 60_000 < resident - streamed + arena + largest
    else:
        assert count == LAYERS
    zo.close()
    limit = {} if memory is None else {"device_memory": memory}
    assert_equal(train(*deep(), settings["offload"], tmp_path, **limit), expected)


def test_one_line_of_log_says_what_is_where(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    model, _ = make("llama")
    with caplog.at_level("INFO", logger="zo_core"):
        ZeroOrder(model, offload="disk", offload_dir=str(tmp_path))
    (line,) = [record.getMessage() for record in caplog.records if "streamed from" in record.getMessage()]
    assert str(tmp_path) in line
    assert "a step reads" in line


def test_generate_works_on_a_streamed_model() -> None:
    model, inputs = make("llama")
    prompt = {"input_ids": inputs["input_ids"][:, :4], "max_new_tokens": 5, "do_sample": False}
    expected = model.eval().generate(**prompt)
    zo = ZeroOrder(model, offload="cpu")
    assert torch.equal(model.generate(**prompt), expected)
    zo.close()
    assert torch.equal(model.generate(**prompt), expected)


def test_closing_gives_ordinary_parameters_back() -> None:
    model, inputs = make("llama")
    reference, _ = make("llama")
    zo, resident = ZeroOrder(model, lr=1e-3, offload="cpu"), ZeroOrder(reference, lr=1e-3)
    zo.step(lambda: model(**inputs).loss)
    zo.close()
    zo.step(lambda: model(**inputs).loss)
    for _ in range(2):
        resident.step(lambda: reference(**inputs).loss)
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_temporary_block_files_go_away_with_the_model() -> None:
    model, inputs = make("llama")
    zo = ZeroOrder(model, offload="disk")
    folder = zo.streaming.store.folder
    zo.step(lambda: model(**inputs).loss)
    assert list(folder.glob("*.safetensors"))
    zo.close()
    del zo
    gc.collect()
    assert not folder.exists()


def test_named_blocks_are_streamed_and_others_stay() -> None:
    model, _ = make("llama")
    zo = ZeroOrder(model, offload="cpu", blocks=("model.layers.1",))
    assert [block.name for block in zo.streaming.blocks] == ["model.layers.1"]
    assert not bool(model.model.layers[0].mlp.up_proj.weight.isnan().any())
