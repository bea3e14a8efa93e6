"""Laws of the int4 target: codes never change, scales move by the stated arithmetic and stay above their floor."""

from __future__ import annotations

import copy
import math
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from int4_models import Quantised, closure, codes, equal, layers, scales
from offload_helpers import in_memory
from probing import PLAIN
from torch import Tensor
from traces import left_as_found, same_bits, weights

from zo_core import NOISES, Int4Scales, Point, ZeroOrder

KINDS = [("nf4", True, 64), ("nf4", False, 64), ("fp4", True, 128), ("fp4", False, 256)]
SETTINGS: dict[str, Any] = {"lr": 1e-2, "seed": 3}


def float_scales(layer: Any) -> Tensor:
    """What bitsandbytes computes from double-quantised scales."""
    state = layer.weight.quant_state
    if not state.nested:
        return state.absmax.clone()
    return bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset


def unnested(model: Quantised) -> Quantised:
    for layer in layers(model):
        values = float_scales(layer)
        layer.weight.quant_state.absmax = values
        layer.weight.quant_state.nested = False
    return model


@pytest.mark.parametrize(("kind", "nested", "blocksize"), KINDS)
@pytest.mark.parametrize("relative", [True, False])
def test_scales_move_and_codes_do_not(kind: str, nested: bool, blocksize: int, relative: bool) -> None:
    model = Quantised(nested, kind, blocksize=blocksize)
    assert layers(model)[0].weight.quant_state.blocksize == blocksize
    before, start = codes(model), [float_scales(layer) for layer in layers(model)]
    floats = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    zo = ZeroOrder(model, target=Int4Scales(relative=relative), **SETTINGS)
    for index in range(4):
        zo.step(closure(model, index))
    assert equal(codes(model), before)
    assert all(not torch.equal(a, b) for a, b in zip(scales(model), start, strict=True))
    assert all(torch.equal(p, floats[name]) for name, p in model.named_parameters() if name in floats)
    assert all(s.dtype == torch.float32 for s in scales(model))


@pytest.mark.parametrize("rule", ["sgd", "momentum"])
def test_at_learning_rate_zero_nothing_changes(rule: str) -> None:
    model = Quantised()
    layers(model)[0].weight.quant_state = quiet = bnb.functional.quantize_4bit(
        torch.cat([torch.zeros(64, 64), torch.randn(64, 64)]), quant_type="nf4", compress_statistics=False
    )[1]
    assert quiet.absmax.min() == 0  # blocks of zeros are below the floor from the start
    zo = ZeroOrder(model, lr=0.0, rule=rule)
    with left_as_found(model):
        before = scales(model)
        for index in range(3):
            zo.step(closure(model, index))
        assert equal(scales(model), before)


def test_an_exception_in_a_probe_leaves_the_scales() -> None:
    model = Quantised()
    zo = ZeroOrder(model, **SETTINGS)
    before = scales(model)

    def fails() -> Tensor:
        closure(model)()
        raise RuntimeError("stop")

    with left_as_found(model), pytest.raises(RuntimeError, match="stop"):
        zo.step(fails)
    assert equal(scales(model), before)


def moved(values: Tensor, z: Tensor, size: float, relative: bool, floor: float) -> Tensor:
    """The arithmetic, once more: one float64 product, or one float32 sum, and the floor."""
    change = (z * torch.tensor(size, dtype=torch.float32)).to(torch.float32)
    new = (values.double() * (1 + change.double())).float() if relative else values + change
    return torch.maximum(new, values.clamp(max=floor))


@pytest.mark.parametrize("noise", [*PLAIN, "low_rank"])  # with masks: see test_sparse.py
@pytest.mark.parametrize("relative", [True, False])
def test_probe_and_update_are_the_stated_arithmetic(relative: bool, noise: str) -> None:
    eps, lr, floor = 1e-2, 3e-2, 0.1242
    model, other = Quantised(), unnested(Quantised())
    zo = ZeroOrder(model, target=Int4Scales(relative, floor), noise=noise, lr=lr, eps=eps)
    start = scales(model)
    assert min(s.min() for s in start) < floor < max(s.max() for s in start)

    def directions(seed: int) -> list[Tensor]:
        z = NOISES.resolve("rademacher" if noise == "low_rank" else noise).z  # scales are no matrices
        return [z(seed, slot.key, 0, slot.tensor.numel()) for slot in zo.slots]

    for layer in layers(other):
        layer.support_avx512bf16_for_cpu = False
    for scale in (eps, -eps):
        for layer, values, z in zip(layers(other), start, directions(7), strict=True):
            layer.weight.quant_state.absmax = moved(values, z, scale, relative, floor)
        with torch.no_grad():
            expected = closure(other)().item()
        assert zo.oracle.losses([Point(7, scale)], closure(model))[0].item() == expected
    record = zo.step(closure(model))
    coefficient = record.probes[0].coefficient
    for found, values, z in zip(scales(model), start, directions(record.seed), strict=True):
        assert torch.equal(found, moved(values, z, -lr * coefficient, relative, floor))


@pytest.mark.parametrize("relative", [True, False])
def test_no_scale_sinks_below_the_floor(relative: bool) -> None:
    model = Quantised()
    zo = ZeroOrder(model, target=Int4Scales(relative, floor=1e-3), lr=10.0, eps=3.0, clip=math.inf)
    seen: list[float] = []
    for layer in layers(model):
        layer.register_forward_hook(lambda layer, *_: seen.append(layer.weight.quant_state.absmax.min().item()))
    for index in range(3):
        zo.step(closure(model, index))
    floor = torch.tensor(1e-3).item()
    assert min(seen) == floor  # in a probe
    assert min(s.min().item() for s in scales(model)) == floor
    assert all(s.isfinite().all() for s in scales(model))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_nested_and_float_scales_train_alike(kind: str) -> None:
    nested, plain = Quantised(kind=kind), unnested(Quantised(kind=kind))
    assert layers(nested)[0].weight.quant_state.nested
    a, b = (ZeroOrder(model, **SETTINGS) for model in (nested, plain))
    for index in range(4):
        assert a.step(closure(nested, index)).as_dict() == b.step(closure(plain, index)).as_dict()
    assert same_bits(weights(nested), weights(plain))


def test_replacing_nested_scales_changes_no_output() -> None:
    model = Quantised()
    for layer in layers(model):
        layer.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        before = closure(model)()
        ZeroOrder(model)
        assert torch.equal(closure(model)(), before)


@pytest.mark.parametrize("kind", ["cpu", "disk"])
@pytest.mark.parametrize("compute", [None, torch.bfloat16])
def test_streamed_equals_resident_and_nothing_is_written_back(kind: str, compute: torch.dtype | None) -> None:
    """With a bfloat16 compute type, bitsandbytes casts biases in place during the forward."""
    model, twin = Quantised(compute=compute), Quantised(compute=compute)
    streamed, resident = ZeroOrder(twin, offload=kind, **SETTINGS), ZeroOrder(model, **SETTINGS)
    for index in range(3):
        found, expected = streamed.step(closure(twin, index)), resident.step(closure(model, index))
        assert found.as_dict() == expected.as_dict()
    assert streamed.streaming is not None
    assert streamed.streaming.bytes_read > 0
    assert streamed.streaming.bytes_written == 0
    with torch.no_grad():
        assert torch.equal(closure(twin, 9)(), closure(model, 9)())
    assert same_bits(weights(twin), weights(model))
    streamed.close()
    assert same_bits(weights(twin), weights(model))


def test_streamed_codes_come_for_whoever_reads_them() -> None:
    model = Quantised()
    zo = ZeroOrder(model, offload="cpu", **SETTINGS)
    weight = layers(model)[2].weight
    assert weight.numel() == 0 or in_memory(weight).numel() == 0
    read = bnb.functional.dequantize_4bit(weight, weight.quant_state)
    zo.close()
    assert torch.equal(read, bnb.functional.dequantize_4bit(weight, weight.quant_state))
    assert read.isfinite().all()


def test_scales_used_outside_their_layer_are_the_perturbed_ones() -> None:
    class Outside(Quantised):
        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            weight = self.blocks[1].up.weight
            return super().forward(x, labels) + bnb.functional.dequantize_4bit(weight, weight.quant_state).mean()

    model, other = Outside(), Outside()
    zo = ZeroOrder(model, **SETTINGS)
    ZeroOrder(other)
    for layer, slot in zip(layers(other), zo.slots, strict=True):
        state = layer.weight.quant_state
        z = NOISES.resolve("rademacher").z(5, slot.key, 0, slot.tensor.numel())
        state.absmax = moved(state.absmax, z, 0.1, True, 1e-7)
    with torch.no_grad():
        expected = closure(other)().item()
    assert zo.oracle.losses([Point(5, 0.1)], closure(model))[0].item() == expected


# bitsandbytes' repacking for CPUs with AVX512-BF16


def test_codes_are_not_repacked() -> None:
    model = Quantised()
    for layer in layers(model):
        layer.support_avx512bf16_for_cpu = True  # as on such a CPU
    before = codes(model)
    zo = ZeroOrder(model.eval(), **SETTINGS)
    zo.step(closure(model))
    with torch.no_grad():
        closure(model)()
    assert equal(codes(model), before)
    assert all(s.dtype == torch.float32 and s.dim() == 1 for s in scales(model))


@pytest.mark.parametrize("nested", [True, False])
def test_codes_that_were_repacked_are_put_in_order(nested: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = Quantised(nested)
    before, start = codes(model), [float_scales(layer) for layer in layers(model)]
    for layer in layers(model):
        layer.weight.data, _ = bnb.functional._convert_weight_packed_for_cpu(
            layer.weight.data, layer.weight.quant_state
        )
    assert not equal(codes(model), before)
    zo = ZeroOrder(model, **SETTINGS)
    assert equal(codes(model), before)
    assert equal(scales(model), [s.bfloat16().float() for s in start])
    (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("zo_core")]
    assert "6 4-bit layers" in message
    assert "bf16" in message
    zo.step(closure(model))
    assert equal(codes(model), before)


# State dicts and resuming


@pytest.mark.parametrize("nested", [True, False])
def test_a_state_dict_gives_back_the_scales(nested: bool) -> None:
    model, fresh = Quantised(nested), Quantised(nested)
    zo = ZeroOrder(model, **SETTINGS)
    zo.step(closure(model))
    ZeroOrder(fresh)
    fresh.load_state_dict(model.state_dict())  # strict
    assert same_bits(weights(fresh), weights(model))


def test_double_quantised_scales_are_loaded_as_their_values() -> None:
    model, fresh = Quantised(), Quantised()
    expected = [float_scales(layer) for layer in layers(fresh)]
    ZeroOrder(model, **SETTINGS).step(closure(model))
    model.load_state_dict(fresh.state_dict())
    assert equal(scales(model), expected)


def test_scales_of_another_shape_are_refused() -> None:
    model, other = Quantised(), Quantised(blocksize=128)
    ZeroOrder(model)
    with pytest.raises(
        RuntimeError, match=r"size mismatch for blocks.0.up.weight.absmax: got \[64\], expected \[128\]"
    ):
        model.load_state_dict(other.state_dict())


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_a_resumed_run_continues_bit_for_bit(offload: str | None) -> None:
    settings = {**SETTINGS, "rule": "momentum", "offload": offload}
    model, later = Quantised(), Quantised()
    zo = ZeroOrder(model, **settings)
    for index in range(2):
        zo.step(closure(model, index))
    saved = copy.deepcopy({"model": model.state_dict(), "zo": zo.state_dict()})
    resumed = ZeroOrder(later, **settings)
    later.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["zo"])
    for index in range(2, 4):
        assert zo.step(closure(model, index)).as_dict() == resumed.step(closure(later, index)).as_dict()
    assert same_bits(weights(model), weights(later))
