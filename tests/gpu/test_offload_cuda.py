"""Law: on CUDA a streamed model has the losses and the weights of a resident one, in less memory."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCAB
from race_scenarios import LIVES, live
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from hf_zo import ZOTrainer, from_pretrained_offloaded
from zo_core import LowRank, ZeroOrder, ZOConfig
from zo_core.streaming.slab import ALIGNMENT
from zo_core.streaming.store import RamStore

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: none is available"),
]


def model(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, max_position_embeddings=64, **shape)).to(dtype)


def train(
    dtype: torch.dtype, place: str, **settings: Any
) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor], int]:
    """Losses and projected gradients, final weights, and the peak of device memory above what was there before."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    net = model(dtype).to(place)
    zo = ZeroOrder(net, **{"lr": 1e-4, "rule": "momentum", "num_probes": 2, **settings})
    ids = torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(1)).cuda()
    records = [zo.step(lambda: net(input_ids=ids, labels=ids).loss) for _ in range(10)]
    zo.flush()
    peak = torch.cuda.max_memory_allocated() - before
    weights = {name: value.cpu().clone() for name, value in net.state_dict().items()}
    zo.close()
    return [(r.loss, r.projected_grad) for r in records], weights, peak


@pytest.fixture(scope="module", autouse=True)
def workspaces() -> None:
    """What cuBLAS keeps for as long as the process lives: 32 MiB on Hopper for each thread that multiplies."""
    train(torch.float32, "cpu", offload="cpu", device="cuda")


@pytest.mark.parametrize("tier", ["cpu", "disk", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_streamed_is_resident(tier: str, dtype: torch.dtype, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"offload": tier, "device": "cuda"}
    if tier == "disk":
        settings["offload_dir"] = str(tmp_path)
    if tier == "auto":
        settings["device_memory"] = "60MB"
    numbers, weights, peak = train(dtype, "cpu", **settings)
    expected, resident, whole = train(dtype, "cuda")
    assert numbers == expected
    assert all(torch.equal(value, resident[name]) for name, value in weights.items())
    if tier != "auto":
        assert peak < whole


@pytest.mark.parametrize("estimator", ["fzoo", "conservative"])
@pytest.mark.parametrize("noise", [LowRank(refresh=4), "sparse", "gaussian", "sampled"], ids=str)
def test_every_noise_and_a_second_round_stream(noise: LowRank | str, estimator: str) -> None:
    settings: dict[str, Any] = {"noise": noise, "estimator": estimator}
    if estimator == "conservative":
        settings["rule"] = "sgd"
    numbers, weights, _ = train(torch.float32, "cpu", offload="cpu", device="cuda", **settings)
    expected, resident, _ = train(torch.float32, "cuda", **settings)
    assert numbers == expected
    assert all(torch.equal(value, resident[name]) for name, value in weights.items())


@pytest.mark.parametrize("life", LIVES, ids=str)
def test_every_life_is_lived(life: tuple[str, str, str, int]) -> None:
    """State dicts, checkpoints, loads, writes and closing meet weights on the host and state on the device."""
    live(*life, "cuda")


@pytest.mark.parametrize("rule", ["sgd", "momentum"])
def test_training_goes_on_after_close(rule: str) -> None:
    losses = []
    for place, settings in (("cpu", {"offload": "cpu", "device": "cuda"}), ("cuda", {})):
        net = model(torch.float32).to(place)
        zo = ZeroOrder(net, lr=1e-4, rule=rule, **settings)
        ids = torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(1)).cuda()
        for step in range(6):
            if step == 3:
                zo.close()
            losses.append(zo.step(lambda net=net, ids=ids: net(input_ids=ids, labels=ids).loss).loss)
    assert losses[:6] == losses[6:]


def test_a_model_that_was_opened_for_the_cpu_trains_on_the_device(tmp_path: Path) -> None:
    model(torch.float32).save_pretrained(tmp_path / "model")
    ids = torch.randint(0, VOCAB, (8, 16), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    ends = []
    for opened in (True, False):
        net = from_pretrained_offloaded(LlamaForCausalLM, tmp_path / "model") if opened else model(torch.float32)
        args = TrainingArguments(tmp_path / "run", max_steps=4, learning_rate=1e-4, report_to="none", disable_tqdm=True)
        ZOTrainer(net, args, train_dataset=rows, zo_config=ZOConfig(rule="momentum")).train()
        ends.append({name: value.cpu().clone() for name, value in net.state_dict().items()})
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_host_memory_is_known_to_the_driver_and_exact() -> None:
    net = model(torch.float16)
    size = sum(p.numel() * p.element_size() for p in net.model.layers.parameters())
    zo = ZeroOrder(net, offload="cpu", device="cuda")
    assert zo.streaming is not None
    assert isinstance(zo.streaming.store, RamStore)
    held = [tensor for block in zo.streaming.store.blocks.values() for tensor in block.values()]
    assert all(tensor.is_pinned() for tensor in held)
    assert sum(tensor.numel() * tensor.element_size() for tensor in held) == size
    slabs = [slab for slabs in zo.streaming.store.slabs.values() for slab in slabs]
    assert len(slabs) == len(net.model.layers)
    assert all(slab.memory.is_pinned() for slab in slabs)
    assert sum(len(slab.memory) for slab in slabs) <= size + ALIGNMENT * len(held) + mmap.PAGESIZE * len(slabs)
    zo.close()


def test_a_block_moves_in_one_copy_each_way() -> None:
    net = model(torch.float16)
    zo = ZeroOrder(net, lr=1e-4, offload="cpu", device="cuda", brake=None)
    ids = torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(1)).cuda()
    for _ in range(4):
        zo.step(lambda: net(input_ids=ids, labels=ids).loss)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        zo.step(lambda: net(input_ids=ids, labels=ids).loss)
        torch.cuda.synchronize()
    zo.close()
    blocks = len(net.model.layers)
    for way in ("HtoD", "DtoH"):
        copies = [event for event in seen.events() if f"Memcpy {way}" in event.name]
        assert blocks <= len(copies) <= blocks + 4, way  # and the losses
