"""Law: the estimate is what the implementation does, counted on a real model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import bitsandbytes
import peft
import pytest
import torch
from models import FAMILIES, batch, closure, tiny
from torch import nn

from hf_zo.estimate import Rates, Row, Workload, as_table, estimate
from hf_zo.estimate.backward import kept_by_backpropagation, peak_of_gradients
from hf_zo.estimate.trace import Segment, together
from hf_zo.estimate.variants import Int4Linear
from zo_core import ConfigError, ZeroOrder, ZOConfig
from zo_core.cache import HEAP_BYTES
from zo_core.streaming import plan_blocks, repeated_layers

ROOT = Path(__file__).parents[2]


def on_meta(name: str, tied: bool = True) -> nn.Module:
    """The tiny model of a family as a stranger's configuration would give it."""
    real = tiny(name, tied)
    real.config.use_cache = False  # as `skeleton` does
    with torch.device("meta"):
        return type(real)(real.config).eval()


def rows(model: nn.Module, **settings: object) -> dict[str, Row]:
    work = {"batch_size": 2, "length": 8, "device": "cpu", "config": ZOConfig(**settings)}
    return {row.name: row for row in estimate(model, Workload(**work))}


def pool_bytes(zo: ZeroOrder) -> int:
    return zo.oracle.realisation.pool.nbytes


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_resident_copies_are_those_of_a_step(name: str, tied: bool) -> None:
    row = rows(on_meta(name, tied))["all weights, resident"]
    model = tiny(name, tied)
    zo = ZeroOrder(model, lr=1e-3)
    zo.step(closure(name, model))
    assert row.traced
    assert row.parts["copies"] == pool_bytes(zo)
    tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    assert row.parts["weights"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert (row.host, row.disk, row.read, row.written) == (0, 0, 0, 0)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_on_a_gpu_the_copies_of_a_layer_are_there_together(name: str) -> None:
    model = on_meta(name, tied=False)
    layers = repeated_layers(model)
    row = {r.name: r for r in estimate(model, Workload(2, 8, "cuda"))}["all weights, resident"]
    own = sum(p.numel() * p.element_size() for p in layers[0].parameters())
    assert row.traced
    assert own <= row.parts["copies"] < 2 * own


@pytest.mark.parametrize(("num_probes", "rule"), [(1, "sgd"), (2, "momentum")])
@pytest.mark.parametrize("name", FAMILIES)
def test_streamed_bytes_are_those_of_a_step(name: str, num_probes: int, rule: str) -> None:
    row = rows(on_meta(name), num_probes=num_probes, rule=rule)["all weights, from host"]
    model = tiny(name)
    zo = ZeroOrder(model, lr=1e-3, offload="cpu", num_probes=num_probes, rule=rule)
    assert zo.streaming is not None
    count = 0
    for _ in range(3):  # an update is written in the sweep after it
        before = zo.streaming.bytes_read, zo.streaming.bytes_written
        zo.step(closure(name, model))
        count = zo.streaming.bytes_written - before[1]
    assert row.parts["copies"] == pool_bytes(zo)
    assert row.read == zo.streaming.bytes_read - before[0]
    assert row.written == count
    held = [*zo.streaming.arenas, *(arena for arena, _ in zo.streaming.loaded.values())]
    assert row.parts["arena"] == sum(arena.numel() for arena in held)
    stored = [tensor for tensors in zo.streaming.store.blocks.values() for tensor in tensors.values()]
    assert row.host == sum(tensor.numel() * tensor.element_size() for tensor in stored)
    zo.close()


def test_on_a_gpu_the_arena_has_a_third_slot() -> None:
    cpu, cuda = (
        {row.name: row for row in estimate(on_meta("t5"), Workload(2, 8, device))}["all weights, from host"]
        for device in ("cpu", "cuda")
    )
    assert 2 * cuda.parts["arena"] == 3 * cpu.parts["arena"] > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_on_meta_are_those_of_the_model(name: str) -> None:
    assert [b.name for b in plan_blocks(on_meta(name))] == [b.name for b in plan_blocks(tiny(name))]
    assert [list(b.holders) for b in plan_blocks(on_meta(name))] == [list(b.holders) for b in plan_blocks(tiny(name))]


def test_device_memory_keeps_blocks_that_fit() -> None:
    model = on_meta("llama")
    whole = rows(model)["all weights, resident"].parts["weights"]
    assert "all weights, from host" not in rows(model, offload="auto", device_memory=2 * whole)


def test_more_tokens_take_more_activations_and_nothing_else() -> None:
    few, many = (
        {r.name: r for r in estimate(on_meta("llama"), Workload(1, length, "cpu"))}["all weights, resident"]
        for length in (32, 128)
    )
    assert many.parts["activations"] == pytest.approx(4 * few.parts["activations"], rel=0.05)
    assert {**many.parts, "activations": 0} == {**few.parts, "activations": 0}


def test_exact_slopes_take_activations_twice_and_have_rows_for_resident_weights() -> None:
    plain, exact = rows(on_meta("llama")), rows(on_meta("llama"), estimator="forward_grad")
    assert set(exact) == {
        name for name in plain if name.startswith("backprop") or ("resident" in name and "int4" not in name)
    }
    one, other = (found["all weights, resident"].parts for found in (plain, exact))
    assert other == {**one, "activations": 2 * one["activations"]}


def test_backprop_in_the_last_layers_is_counted() -> None:
    """Streamed bytes are those of a step, and gradients and moments those of the named weights."""
    names = ("lm_head", "model.norm", "model.layers.3")
    model = tiny("llama", tied=False, layers=4)
    zo = ZeroOrder(model, lr=1e-3, offload="cpu", backprop=names)
    assert zo.streaming is not None
    assert zo.backprop is not None
    for _ in range(3):
        read, written = zo.streaming.bytes_read, zo.streaming.bytes_written
        zo.step(closure("llama", model))
    with torch.device("meta"):
        meta = type(model)(model.config).eval()
    meta.config.use_cache = False
    found = rows(meta, backprop=names)
    row, resident = found["all weights, from host"], found["all weights, resident"]
    assert not any("int4" in name or "LoRA" in name for name in found if not name.startswith("backprop"))
    size = sum(weight.numel() * weight.element_size() for weight in zo.backprop.weights.values())
    assert row.parts["gradients, AdamW"] == resident.parts["gradients, AdamW"] == 3 * size
    assert row.parts["copies"] == pool_bytes(zo)
    assert (row.read, row.written) == (zo.streaming.bytes_read - read, zo.streaming.bytes_written - written)
    blocks = [tensor for tensors in zo.streaming.store.blocks.values() for tensor in tensors.values()]
    assert row.parts["weights"] == resident.parts["weights"] - sum(t.numel() * t.element_size() for t in blocks)
    assert row.forwards == rows(meta)["all weights, from host"].forwards + 1  # type: ignore[operator]
    assert all(parameter.requires_grad for parameter in meta.parameters())
    with pytest.raises(ConfigError, match="'heads' is no module"):
        rows(meta, backprop=("heads",))


@pytest.mark.parametrize("last", [1, 3])
def test_a_graph_of_the_last_layers_is_what_autograd_saves(last: int) -> None:
    names = ("lm_head", "model.norm", *(f"model.layers.{index}" for index in range(4 - last, 4)))
    model = tiny("llama", tied=False, layers=4)
    zo = ZeroOrder(model, lr=1e-3, backprop=names)
    assert zo.backprop is not None
    weights = list(zo.backprop.weights.values())
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with zo.backprop._alone(model), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.eval()(**batch("llama")).loss
    size = sum(t.untyped_storage().nbytes() for pointer, t in saved.items() if pointer not in own)
    del loss
    meta = on_meta("llama", tied=False)
    with torch.device("meta"):
        meta = type(meta)(model.config).eval()
    theirs = [meta.get_parameter(name) for name in zo.backprop.weights]
    peak = peak_of_gradients(meta, theirs, [{key: value.to("meta") for key, value in batch("llama").items()}])
    assert peak is not None
    assert size <= peak <= 2 * size + sum(weight.nbytes for weight in weights)


def test_logits_are_counted() -> None:
    """Once as the model makes them, and once as logarithms; a float32 model needs no upcast."""
    config = on_meta("llama").config
    config.vocab_size = 4096
    with torch.device("meta"):
        model = type(on_meta("llama"))(config).eval()
    row = {r.name: r for r in estimate(model, Workload(1, 32, "cpu"))}["all weights, resident"]
    logits = 32 * 4096 * 4
    assert 2 * logits <= row.parts["activations"] <= 2.2 * logits


def test_heaps_that_are_not_trimmed_keep_what_their_probes_had() -> None:
    """With large blocks a probe that waits has what is alive, with small ones also what it has freed."""
    segments = [Segment(10, Counter({None: 10}), Counter({None: 3})), Segment(40, Counter({None: 40}), Counter())]
    assert together(segments, 3, pooled=True).activations == 40 + 2 * 3
    assert together(segments, 3, pooled=True, kept=HEAP_BYTES).activations == 40 + 2 * 40
    assert together(segments, 3, pooled=True, kept=20).activations == 40 + 2 * 20


def test_int4_and_lora_move_less() -> None:
    found = rows(on_meta("llama"))
    full, int4, lora = (found[f"{way}, from disk"] for way in ("all weights", "int4 scales", "LoRA 16"))
    weights = 32 * 32 * 2 + 2 * 16 * 32 + 3 * 32 * 48  # of the linear layers of one block
    assert int4.read == 0  # two blocks: both stay in the arena
    assert int4.disk == 2 * (weights // 2 + 2 * 32 * 4)  # two weights a byte, and the norms of each block
    assert (int4.written, lora.written) == (0, 0)
    assert full.written > 0
    assert lora.parts["copies"] < full.parts["copies"]


def test_lora_is_that_of_peft() -> None:
    row = rows(on_meta("llama"))["LoRA 16, resident"]
    model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=16))
    zo = ZeroOrder(model, lr=1e-3)
    zo.step(closure("llama", model))
    assert row.parts["copies"] == pool_bytes(zo)
    frozen = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    assert row.parts["weights"] == sum(t.numel() * t.element_size() for t in frozen.values())


def test_int4_layers_are_those_of_bitsandbytes() -> None:
    theirs = bitsandbytes.nn.Linear4bit(128, 96, bias=False, quant_type="nf4", compress_statistics=False)
    theirs.load_state_dict({"weight": torch.ones(96, 128)})
    weight = theirs.to("cpu").weight
    with torch.device("meta"):
        ours = Int4Linear(nn.Linear(128, 96, bias=False))
    assert (ours.weight.shape, ours.weight.dtype) == (weight.shape, weight.dtype)
    assert (ours.scales.shape, ours.scales.dtype) == (weight.quant_state.absmax.shape, weight.quant_state.absmax.dtype)


def test_backpropagation_beside_it() -> None:
    model = on_meta("llama")
    count = sum(p.numel() for p in model.parameters())
    found = rows(model)
    row = found["backprop: AdamW, all weights"]
    assert row.device - row.parts["activations"] == 16 * count
    for way, full in (("AdamW", "AdamW, all weights"), ("QLoRA", "QLoRA")):
        checkpointed = found[f"backprop: {way}, checkpointing"]
        assert 0 < checkpointed.parts["activations"] < found[f"backprop: {full}"].parts["activations"]
    assert found["backprop: QLoRA"].parts["activations"] < row.parts["activations"]


@pytest.mark.parametrize("name", ["llama", "opt", "bert"])
def test_backpropagation_keeps_what_autograd_saves(name: str) -> None:
    """On a real model: everything that the graph holds between forward and backward."""
    model = tiny(name).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch(name)).loss
    size = sum(t.untyped_storage().nbytes() for pointer, t in saved.items() if pointer not in own)
    meta = on_meta(name)
    inputs = {key: value.to("meta") for key, value in batch(name).items()}
    kept = kept_by_backpropagation(meta, [inputs], len(repeated_layers(meta)))
    loss.backward()
    assert kept is not None
    assert size <= kept.plain <= 2 * size


def test_time_is_bound_by_what_is_slowest() -> None:
    model = on_meta("llama")

    def seconds(rates: Rates, name: str) -> float | None:
        found = {r.name: r for r in estimate(model, Workload(2, 8, "cuda", rates=rates))}
        return found[name].seconds

    matrices = sum(p.numel() for p in model.parameters())  # the embedding is the head, too
    assert seconds(Rates(flops=1e6), "all weights, resident") == 2 * 2.0 * matrices * 16 / 1e6
    assert seconds(Rates(flops=1e6), "all weights, from disk") is None
    row = rows(model)["all weights, from disk"]
    assert seconds(Rates(1e3, 1.0, 1e12), "all weights, from disk") == row.read + row.written


class AsksForValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return input_ids[: int(input_ids.sum())]


def test_a_forward_that_needs_values_falls_back_to_a_formula() -> None:
    with torch.device("meta"):
        found = rows(AsksForValues())
    row = found["all weights, resident"]
    assert not row.traced
    assert row.parts["copies"] == 4 * (64 + 8)
    assert "activations are a formula" in as_table("", list(found.values()), Workload())
