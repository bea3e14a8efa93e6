"""Laws of the torchao target: codes never change, scales move by the stated arithmetic, and conversions keep them."""

from __future__ import annotations

import copy
import io
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import Float8WeightOnlyConfig, Int8DynamicActivationIntxWeightConfig, Int8WeightOnlyConfig
from torchao_models import GROUPS, ROWS, Quantised, closure, equal, parts, plain, quantised
from traces import HOOKS, same_bits

from zo_core import (
    NOISES,
    ConfigError,
    ModelError,
    Point,
    SeedLogWriter,
    TorchaoScales,
    ZeroOrder,
    ZOConfig,
    replay,
)

SETTINGS: dict[str, Any] = {"lr": 1e-2, "eps": 1e-2, "seed": 3}


@pytest.mark.parametrize("scheme", [GROUPS, ROWS, Int8WeightOnlyConfig()], ids=["groups", "rows", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_scales_move(scheme: Any, dtype: torch.dtype) -> None:
    model = Quantised(scheme, dtype)
    with torch.no_grad():
        loss = closure(model)()
        zo = ZeroOrder(model, **SETTINGS)
        assert torch.equal(closure(model)(), loss)  # float32 scales compute the same
    assert (zo.target.name, zo.clip) == ("torchao_scales", 100.0)
    assert [slot.key for slot in zo.slots] == [f"{i}.{leaf}.weight.scale" for i in range(2) for leaf in ("up", "down")]
    before = plain(model)
    for index in range(4):
        zo.step(closure(model, index))
    after = plain(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.endswith(".scale")}
    assert not zo.oracle.realisation.whole
    assert {after[name].dtype for name in moved} == {torch.float32}


@pytest.mark.parametrize("rule", ["sgd", "momentum"])
def test_at_learning_rate_zero_nothing_changes(rule: str) -> None:
    model = Quantised()
    quantised(model)[0].scale[:64] = 0.0  # below the floor from the start
    zo = ZeroOrder(model, lr=0.0, rule=rule)
    before, found = plain(model), hooks(model)
    for index in range(3):
        zo.step(closure(model, index))
    assert same_bits(plain(model), before)
    assert hooks(model) == found


def hooks(model: nn.Module) -> list[int]:
    return [len(getattr(module, kind)) for module in model.modules() for kind in HOOKS]


def test_an_exception_in_a_probe_leaves_the_scales() -> None:
    model = Quantised()
    zo = ZeroOrder(model, **SETTINGS)
    before, found = plain(model), hooks(model)

    def fails() -> Tensor:
        closure(model)()
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        zo.step(fails)
    assert same_bits(plain(model), before)
    assert hooks(model) == found


@pytest.mark.parametrize("relative", [True, False])
def test_probe_and_update_are_the_stated_arithmetic(relative: bool) -> None:
    model, other = Quantised(), Quantised()
    start = parts(model, "scale")
    floor = torch.cat([scale.flatten() for scale in start]).median().item()
    eps, lr = 1e-2, 3e-2
    zo = ZeroOrder(model, target=TorchaoScales(relative, floor), lr=lr, eps=eps)

    def moved(seed: int, size: float) -> list[Tensor]:
        result = []
        for slot, values in zip(zo.slots, start, strict=True):
            z = NOISES.resolve("rademacher").z(seed, slot.key, 0, values.numel()).view(values.shape)
            change = z * torch.tensor(size, dtype=torch.float32)
            new = (values.double() * (1 + change.double())).float() if relative else values + change
            result.append(torch.maximum(new, values.clamp(max=floor)))
        return result

    for scale in (eps, -eps):
        for weight, values in zip(quantised(other), moved(7, scale), strict=True):
            weight.scale = values
        with torch.no_grad():
            expected = closure(other)().item()
        assert zo.oracle.losses([Point(7, scale)], closure(model))[0].item() == expected
    record = zo.step(closure(model))
    assert equal(parts(model, "scale"), moved(record.seed, -lr * record.probes[0].coefficient))


def test_a_weight_used_outside_its_layer_has_perturbed_scales() -> None:
    """The call shows the weight, not the scales inside of it, so all scales are copied at once."""

    class Outside(Quantised):
        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            up = self.blocks[1].up
            return super().forward(x, labels) + F.linear(self.embed(x), up.weight, up.bias).mean()

    model, other = Outside(), Outside()
    zo, twin = ZeroOrder(model, **SETTINGS), ZeroOrder(other, **SETTINGS)
    twin.copy_whole()
    for index in range(2):
        assert zo.step(closure(model, index)).as_dict() == twin.step(closure(other, index)).as_dict()
    assert zo.oracle.realisation.whole
    assert same_bits(plain(model), plain(other))


def test_tied_weights_are_one_slot() -> None:
    model = Quantised()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    zo = ZeroOrder(model, **SETTINGS)
    assert [len(slot.modules) for slot in zo.slots] == [2, 1, 1]
    zo.step(closure(model))


# Conversions, state dicts, resuming


def convert(model: nn.Module) -> nn.Module:
    return model.to("cpu", torch.bfloat16)


@pytest.mark.parametrize("move", [lambda model: model.to("cpu"), convert], ids=["to", "to bfloat16"])
def test_scales_that_move_stay_those_of_a_converted_model(move: Callable[[nn.Module], nn.Module]) -> None:
    """``module.to()`` gives weights new tensors, which would be trained by nobody."""
    model, other = Quantised(), Quantised()
    zo, twin = ZeroOrder(model, **SETTINGS), ZeroOrder(other, **SETTINGS)
    zo.step(closure(model))
    twin.step(closure(other))
    scales = [slot.tensor for slot in zo.slots]
    move(model)
    with torch.no_grad():
        closure(model)()
    assert [weight.scale is scale for weight, scale in zip(quantised(model), scales, strict=True)] == [True] * 4
    move(model)
    assert equal(parts_of_state(model), parts(other, "scale"))  # exact in a state dict, whatever the weights' dtype
    before = parts(model, "scale")
    zo.step(closure(model, 1))
    assert not equal(parts(model, "scale"), before)


def parts_of_state(model: nn.Module) -> list[Tensor]:
    return [value.scale.clone() for value in model.state_dict().values() if hasattr(value, "qdata")]


def test_another_weight_in_the_place_of_one_keeps_its_own_scales() -> None:
    model, other = Quantised(), Quantised()
    ZeroOrder(model, **SETTINGS).step(closure(model))
    model.blocks[0].up.weight = other.blocks[0].up.weight
    with torch.no_grad():
        closure(model)()
    assert torch.equal(model.blocks[0].up.weight.scale, parts(Quantised(), "scale")[0])


@pytest.mark.parametrize("written", [False, True])
def test_a_resumed_run_continues_bit_for_bit(written: bool) -> None:
    settings = {**SETTINGS, "rule": "momentum"}
    model, later = Quantised(), Quantised()
    zo = ZeroOrder(model, **settings)
    for index in range(2):
        zo.step(closure(model, index))
    saved = copy.deepcopy({"model": model.state_dict(), "zo": zo.state_dict()})
    if written:
        file = io.BytesIO()
        torch.save(saved, file)
        saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed = ZeroOrder(later, **settings)
    later.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["zo"])
    for index in range(2, 4):
        assert zo.step(closure(model, index)).as_dict() == resumed.step(closure(later, index)).as_dict()
    assert same_bits(plain(model), plain(later))


def test_loading_into_a_converted_model_reaches_the_scales_that_move() -> None:
    model, trained = Quantised(), Quantised()
    ZeroOrder(trained, **SETTINGS).step(closure(trained))
    zo = ZeroOrder(model, **SETTINGS)
    model.to("cpu")
    model.load_state_dict(trained.state_dict())
    assert equal([slot.tensor for slot in zo.slots], parts(trained, "scale"))


def test_scales_of_another_shape_are_refused() -> None:
    model, other = Quantised(), Quantised(ROWS)
    ZeroOrder(model)
    flat = {
        f"blocks.0.up._weight_{name}": getattr(quantised(other)[0], name) for name in ("qdata", "scale", "zero_point")
    }
    with pytest.raises(
        RuntimeError, match=r"size mismatch for blocks.0.up.weight.scale: got \[128, 1\], expected \[128, 2\]"
    ):
        model.load_state_dict(flat, strict=False)


def test_a_seed_log_replays(tmp_path: Path) -> None:
    model, again = Quantised(), Quantised()
    zo = ZeroOrder(model, **SETTINGS)
    log = SeedLogWriter.attach(zo, tmp_path / "log")
    for index in range(3):
        zo.step(closure(model, index))
    log.close()
    replay(again, tmp_path / "log", progress=False)
    assert same_bits(plain(again), plain(model))


# Errors


def test_offload_says_what_to_do() -> None:
    model = Quantised()
    before = plain(model)
    with pytest.raises(ModelError, match=r"blocks.0.up.weight is a \w+.*leave out offload.*load_in_4bit=True"):
        ZeroOrder(model, offload="cpu", **SETTINGS)
    assert same_bits(plain(model), before)


def test_layers_that_quantise_their_inputs_are_refused() -> None:
    model = Quantised(Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4))
    with pytest.raises(ModelError, match=r"blocks.0.up.weight quantises the inputs.*target='trainable'"):
        ZeroOrder(model)


def test_weights_whose_kernels_were_not_tried_are_refused() -> None:
    model = Quantised(Float8WeightOnlyConfig())
    with pytest.raises(ModelError, match=r"blocks.0.up.weight is a Float8Tensor.*IntxWeightOnlyConfig.*target='train"):
        ZeroOrder(model)


def test_a_model_without_such_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"Linear has no weights of torchao.*quantize_.*target='trainable'"):
        ZeroOrder(nn.Linear(2, 2), target="torchao_scales")
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ModelError, match=r"needs the package torchao; pip install 'zo-trainer\[torchao\]'"):
        ZeroOrder(nn.Linear(2, 2), target="torchao_scales")


def test_settings_are_checked_and_survive_being_written_down() -> None:
    with pytest.raises(ConfigError, match=r"target 'torchao_scales': floor=-1.0 must be"):
        ZeroOrder(Quantised(), target={"name": "torchao_scales", "floor": -1.0})
    config = ZOConfig(target=TorchaoScales(relative=False), clip=math.inf)
    assert ZOConfig.from_dict(config.to_dict()) == config.replace(target=config.to_dict()["target"])
    model = Quantised()
    with pytest.raises(ConfigError, match=r"target='torchao_scales'.*leave out the optimizer"):
        ZeroOrder(model, optimizer=torch.optim.AdamW(model.head.parameters()), target="torchao_scales")


def test_unquantised_parameters_may_move_too() -> None:
    model = Quantised()
    zo = ZeroOrder(model, target=TorchaoScales(others=True, others_lr=1e-4, others_eps=1e-3), **SETTINGS)
    before = plain(model)
    zo.step(closure(model))
    after = plain(model)
    assert {name for name in before if torch.equal(before[name], after[name])} == {
        name for name in before if name.endswith((".qdata", ".zero_point"))
    }
