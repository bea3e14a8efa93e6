"""The int4 target's settings, its errors, and targets for other schemes as they are documented."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from int4_models import Quantised, closure, equal, layers, scales
from torch import Tensor, nn
from traces import weights

from zo_core import NOISES, TARGETS, ConfigError, Int4Scales, ModelError, ZeroOrder, ZOConfig, ZOOptimizer

SETTINGS: dict[str, Any] = {"lr": 1e-2, "seed": 3}


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


@pytest.mark.parametrize("target", ["auto", "int4_scales"])
@pytest.mark.parametrize("loaded", [False, True])
def test_8bit_layers_are_refused(target: str, loaded: bool) -> None:
    """Also where other parameters could be trained: that nothing else moves has to be asked for."""
    model = nn.Sequential(bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=False), nn.Linear(8, 2))
    if loaded:
        model.to("cpu")  # which quantises
        assert model[0].weight.dtype == torch.int8
    with pytest.raises(ModelError, match=r"8-bit layers round their inputs.*load_in_4bit=True.*target='trainable'"):
        ZeroOrder(model, target=target)
    model[0].bias.requires_grad_(False)
    assert [slot.key for slot in ZeroOrder(model, target="trainable").slots] == ["weight", "bias"]


def test_8bit_layers_that_train_in_16_bits_are_ordinary() -> None:
    model = nn.Sequential(bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=True))
    assert [slot.key for slot in ZeroOrder(model).slots] == ["weight", "bias"]


def test_layers_that_are_not_quantised_yet() -> None:
    with pytest.raises(ModelError, match=r"not quantised yet.*model.to\('cpu'\)"):
        ZeroOrder(nn.Sequential(bnb.nn.Linear4bit(64, 64)))


@pytest.mark.parametrize(("columns", "affected"), [(64, False), (96, True), (97, False)])
def test_weights_that_bitsandbytes_reads_wrongly_are_named(
    columns: int, affected: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """An even number of columns that is no multiple of the block size, with the kernel for AVX-512 alone."""
    layer = bnb.nn.Linear4bit(columns, 64, compute_dtype=torch.float32, quant_type="nf4")
    exact = layer.weight.data.normal_().clone()
    model = nn.Sequential(layer).to("cpu")
    ZeroOrder(model, lr=1e-3)
    said = "wrong values of 0.weight" in caplog.text
    assert said == (affected and torch.backends.cpu.get_cpu_capability() == "AVX512")
    read = bnb.functional.dequantize_4bit(model[0].weight.data, model[0].weight.quant_state)
    error = (read - exact).norm() / exact.norm()
    assert (error > 0.15) == said  # rounding normal weights to 16 values leaves 0.09


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
    text = (Path(__file__).parents[2] / "docs" / "int4.md").read_text()
    code = text[text.index("from dataclasses import dataclass\nfrom zo_core import TARGETS, ModelError") :]
    code = code[: code.index("```")]
    monkeypatch.setattr(TARGETS, "_classes", dict(TARGETS._classes))
    exec(code, {"__name__": "documented"})
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
