"""Laws of the int4 target: codes never change, scales move by the stated arithmetic and stay above their floor."""

from __future__ import annotations

import copy
import math
import sys
import textwrap
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from int4_models import Quantised, closure, codes, equal, layers, scales
from probing import PLAIN
from torch import Tensor, nn
from traces import left_as_found, same_bits, weights

from zo_core import NOISES, TARGETS, ConfigError, Int4Scales, ModelError, Point, ZeroOrder, ZOConfig, ZOOptimizer

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
        z = NOISES.resolve(noise).z
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


def test_a_stray_use_of_streamed_codes_is_an_error() -> None:
    model = Quantised()
    zo = ZeroOrder(model, offload="cpu", **SETTINGS)
    weight = layers(model)[2].weight
    with pytest.raises(RuntimeError):
        bnb.functional.dequantize_4bit(weight, weight.quant_state)
    zo.close()
    assert bnb.functional.dequantize_4bit(weight, weight.quant_state).isfinite().all()


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
    with pytest.raises(RuntimeError, match=r"size mismatch for blocks.0.up.weight.absmax: \[64\] came for \[128\]"):
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


# What moves


def test_unquantised_parameters_may_move_with_numbers_of_their_own() -> None:
    model = Quantised()
    floats = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    zo = ZeroOrder(model, lr=1e-2, eps=1e-2, target=Int4Scales(others=True, others_lr=1e-4, others_eps=1e-3))
    assert [(g["lr"], g["eps"]) for g in zo.optimizer.param_groups] == [(1e-2, 1e-2), (1e-4, 1e-3)]
    assert len(zo.slots) == len(layers(model)) + len(floats)
    assert len({slot.key for slot in zo.slots}) == len(zo.slots)
    before = scales(model)
    record = zo.step(closure(model))
    assert not equal(scales(model), before)
    z = NOISES.resolve("rademacher").z
    step = -1e-4 * record.probes[0].coefficient / (1e-3 / 1e-2)
    slot = next(slot for slot in zo.slots if slot.tensor is model.head.weight)
    expected = floats["head.weight"] + z(record.seed, slot.key, 0, slot.tensor.numel(), scale=step).view(5, 64)
    assert torch.equal(model.head.weight, expected)


def test_fused_expert_weights_are_scales_too() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 8, 64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("eoi,bi->beo", self.weight, x).mean()

    model = Experts()
    replace_parameter_4bit(model, "weight", compress_statistics=True)
    zo = ZeroOrder(model, **SETTINGS)
    assert [slot.key for slot in zo.slots] == ["absmax"]
    original = model.parametrizations.weight.original.clone()
    x = torch.randn(3, 64)
    losses = {zo.step(lambda: model(x)).loss for _ in range(3)}
    assert len(losses) == 3
    assert torch.equal(model.parametrizations.weight.original, original)
    again = Experts()
    replace_parameter_4bit(again, "weight", compress_statistics=True)
    ZeroOrder(again)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.weight, model.weight)


def test_clipping_is_on_by_default() -> None:
    model = Quantised()
    assert ZeroOrder(model).clip == 100.0
    assert ZeroOrder(model, clip=3.0).clip == 3.0
    assert ZeroOrder(model, clip=math.inf).clip == math.inf
    assert ZeroOrder(model, target="trainable").clip == math.inf
    record = ZeroOrder(model, lr=0.0).step(lambda: closure(model)() * 1e6)
    assert record.clipped == 1
    assert abs(record.probes[0].coefficient) == 100.0


def test_settings_survive_being_written_down() -> None:
    config = ZOConfig(target=Int4Scales(relative=False, others=True, others_lr=1e-6), clip=math.inf)
    assert ZOConfig.from_dict(config.to_dict()) == config.replace(target=config.to_dict()["target"])
    assert TARGETS.resolve(config.to_dict()["target"]) == config.target
    assert ZOConfig().to_dict()["target"] == "auto"


def test_scales_in_groups_of_an_optimizer() -> None:
    model = Quantised()
    slots = Int4Scales().slots(model)
    chosen = [slot.tensor for slot in slots if slot.key.startswith("0.")]
    zo = ZeroOrder(model, optimizer=ZOOptimizer([{"params": chosen, "lr": 1e-2, "eps": 1e-2}]))
    before = scales(model)
    zo.step(closure(model))
    assert [torch.equal(a, b) for a, b in zip(scales(model), before, strict=True)] == [False] * 2 + [True] * 4


# Errors


def test_a_model_without_4bit_layers() -> None:
    with pytest.raises(ModelError, match=r"Linear has no 4-bit layers.*load_in_4bit=True.*target='trainable'"):
        ZeroOrder(nn.Linear(2, 2), target="int4_scales")
    with pytest.raises(ModelError, match="8-bit layers round their inputs"):
        ZeroOrder(nn.Sequential(bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=False)), target="int4_scales")


def test_layers_that_are_not_quantised_yet() -> None:
    with pytest.raises(ModelError, match=r"not quantised yet.*model.to\('cpu'\)"):
        ZeroOrder(nn.Sequential(bnb.nn.Linear4bit(64, 64)))


def test_bitsandbytes_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model = nn.Linear(2, 2)
    assert ZeroOrder(model).slots  # nothing else needs it
    with pytest.raises(ModelError, match=r"needs the package bitsandbytes; pip install 'zo-trainer\[int4\]'"):
        ZeroOrder(model, target="int4_scales")


def test_a_torch_optimizer_does_not_know_scales() -> None:
    model = Quantised()
    with pytest.raises(ConfigError, match=r"target='int4_scales'.*leave out the optimizer.*target='trainable'"):
        ZeroOrder(model, optimizer=torch.optim.AdamW(model.parameters()))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"floor": -1.0}, "floor=-1.0 must be"),
        ({"floor": math.nan}, "floor=nan"),
        ({"relative": 1}, "relative=1 must be True or False"),
        ({"others_lr": 1e-3}, "others_lr=0.001 has no use.*others=True"),
        ({"others": True, "others_eps": 0.0}, "others_eps=0.0 must be a number above 0"),
        ({"beta": 1}, "its fields are: relative, floor, others"),
    ],
    ids=str,
)
def test_a_field_that_cannot_work(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ZeroOrder(Quantised(), target={"name": "int4_scales", **settings})


# Other schemes


class GptqLinear(nn.Module):
    """Stands for a layer of GPTQ or AWQ: integer codes and 16-bit scales, as buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.randint(-8, 8, (16, 8), dtype=torch.int8))
        self.register_buffer("scales", (torch.rand(16, 1) / 10 + 0.01).half())

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.qweight * self.scales.float()).t()


def test_the_documented_target_for_another_scheme_works(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parent.parent / "docs" / "int4.md").read_text()
    code = text[text.index("    from dataclasses import dataclass\n    from zo_core import TARGETS") :]
    code = code[: code.index("\nThe tensor is pointed")]
    monkeypatch.setattr(TARGETS, "_classes", dict(TARGETS._classes))
    exec(textwrap.dedent(code), {"__name__": "documented"})
    model = nn.Sequential(GptqLinear(), nn.Tanh(), nn.Linear(16, 2))
    zo = ZeroOrder(model, target="gptq_scales", lr=1e-2, eps=1e-2, noise="gaussian")
    assert ([slot.key for slot in zo.slots], zo.clip) == (["scales"], 100.0)
    before = weights(model)
    x = torch.randn(4, 8)
    grads = {zo.step(lambda: model(x).square().mean()).projected_grad for _ in range(3)}
    assert len(grads) == 3
    assert [name for name, value in weights(model).items() if not torch.equal(value, before[name])] == ["0.scales"]
    assert model[0].scales.dtype == torch.float16
    assert model[0].scales.min() > 0
    with pytest.raises(ModelError, match="no GPTQ"):
        ZeroOrder(nn.Linear(2, 2), target="gptq_scales")
