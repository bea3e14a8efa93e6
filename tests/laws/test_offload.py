"""Law: a streamed model has the losses and the weights of a resident one, bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from offload_helpers import TIERS, assert_equal, make, train
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from zo_core import ZeroOrder

pytestmark = pytest.mark.usefixtures("no_probe_thread_is_left")
slow = pytest.mark.slow

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum, decay, 4 probes": {"rule": "momentum", "weight_decay": 0.1, "num_probes": 4},
    "fzoo": {"estimator": "fzoo", "num_probes": 3},
    "sign, gaussian": {"rule": "sign", "noise": "gaussian", "lr": 1e-4},
}


@pytest.mark.parametrize("tier", ["cpu", pytest.param("disk", marks=slow)])
@pytest.mark.parametrize("name", ["llama", "opt", "bert", "t5", "mixtral"])
@pytest.mark.parametrize(
    "settings",
    [pytest.param(value, id=name, marks=() if name == "plain" else slow) for name, value in SETTINGS.items()],
)
def test_streamed_equals_resident(name: str, settings: dict[str, Any], tier: str, tmp_path: Path) -> None:
    resident = train(*make(name), None, tmp_path, **settings)
    assert_equal(train(*make(name), tier, tmp_path, **settings), resident)


class WideFirst(nn.Module):
    """Begins with a matrix product that two threads of a processor may round otherwise than one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10000, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        for block in self.blocks:
            hidden = torch.tanh(block(hidden))
        return hidden.square().mean()


class Tied(nn.Module):
    """A layer that uses one weight twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.b(self.a(x)))


@pytest.mark.parametrize("noise", ["rademacher", "sampled"])
@pytest.mark.parametrize("penalty", ["before", "after", None])
@pytest.mark.parametrize("layer", [lambda: nn.Linear(6, 6), Tied])
def test_weights_that_do_not_move_are_the_same_outside_of_their_layer(layer: Any, penalty: Any, noise: str) -> None:
    """With a penalty on all weights, and a model that is called twice: some points move nothing, or few layers."""

    def trained(tier: str | None) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(*(layer() for _ in range(5)))
        x = torch.randn(4, 6)
        zo = ZeroOrder(model, offload=tier, blocks=None if tier is None else [str(i) for i in range(5)], noise=noise)

        def loss() -> Tensor:
            total = torch.zeros(())
            for now in ("before", "forward", "after"):
                if now == penalty:
                    total = total + 1e-2 * torch.stack([p.square().sum() for p in model.parameters()]).sum()
                elif now == "forward":
                    total = total + model(x).square().mean() + model(1 - x).square().mean()
            return total

        losses = [torch.tensor(float(zo.step(loss))) for _ in range(4)]
        zo.close()
        return [*losses, *(p.detach().clone() for p in model.parameters())]

    for mine, theirs in zip(trained("cpu"), trained(None), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("threads", [(1, 2), (2, 1)])
def test_streamed_equals_resident_on_any_number_of_threads(threads: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = WideFirst()
    x = torch.randn(8, 10000)
    engines = [ZeroOrder(copy.deepcopy(model), offload=tier, lr=1e-3) for tier in (None, "cpu")]
    for number in threads:
        torch.set_num_threads(number)
        found = [zo.step(lambda model=zo.model: model(x)).as_dict() for zo in engines]
        assert found[0] == found[1]


@pytest.mark.parametrize("name", ["llama", "opt", "bert", "t5", "mixtral"])
@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        pytest.param(SETTINGS["plain"], torch.float32, id="plain"),
        pytest.param(SETTINGS["plain"], torch.bfloat16, id="bf16", marks=slow),
        *(pytest.param(SETTINGS[key], torch.float32, id=key, marks=slow) for key in SETTINGS if key != "plain"),
    ],
)
def test_partly_streamed_equals_resident(
    name: str, settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    def model() -> tuple[nn.Module, dict[str, Tensor]]:
        return make(name, dtype=dtype, layers=5)

    whole = {p: p.numel() * p.element_size() for p in model()[0].parameters()}
    settings = {"device_memory": sum(whole.values()) * 3 // 4, **settings}
    zo = ZeroOrder(model()[0], offload="auto", **settings)
    assert zo.streaming is not None
    layers = sum(1 for module in zo.model.modules() if type(module) is type(zo.streaming.blocks[0].module))
    assert 0 < len(zo.streaming.blocks) < layers
    zo.close()
    partly = train(*model(), "auto", tmp_path, **settings)
    del settings["device_memory"]
    assert_equal(partly, train(*model(), None, tmp_path, **settings))


@pytest.mark.parametrize("tier", ["disk", pytest.param("cpu", marks=slow)])
@pytest.mark.parametrize("name", ["llama", pytest.param("t5", marks=slow), pytest.param("mixtral", marks=slow)])
def test_streamed_equals_resident_in_bf16_untied(name: str, tier: str, tmp_path: Path) -> None:
    resident = train(*make(name, tied=False, dtype=torch.bfloat16), None, tmp_path)
    assert_equal(train(*make(name, tied=False, dtype=torch.bfloat16), tier, tmp_path), resident)


@pytest.mark.parametrize("name", ["llama", "opt", "bert"])
def test_streamed_equals_resident_with_dropout_and_layerdrop(name: str, tmp_path: Path) -> None:
    def dropping() -> tuple[nn.Module, dict[str, Tensor]]:
        model, inputs = make(name)
        for module in model.modules():
            if hasattr(module, "layerdrop"):
                module.layerdrop = 0.5  # probes then visit different numbers of blocks in different steps
        return model.train(), inputs

    results = []
    for tier in (None, "cpu"):
        results.append(train(*dropping(), tier, tmp_path, dropout=True, num_probes=2))
        results[-1][0].append(float(torch.rand(())))  # and the global generator stands where it should
    assert_equal(*results)


def test_streamed_equals_resident_under_autocast(tmp_path: Path) -> None:
    def autocast() -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    resident = train(*make("llama"), None, tmp_path, wrap=autocast)
    assert_equal(train(*make("llama"), "cpu", tmp_path, wrap=autocast), resident)
    with autocast():
        assert_equal(train(*make("llama"), "cpu", tmp_path), train(*make("llama"), None, tmp_path))


@pytest.mark.parametrize("tier", TIERS)
def test_adapters_train_on_a_streamed_base_that_is_never_written(tier: str, tmp_path: Path) -> None:
    def adapted() -> tuple[nn.Module, dict[str, Tensor]]:
        model, inputs = make("llama")
        torch.manual_seed(2)
        return get_peft_model(model, LoraConfig(r=2, init_lora_weights=False)), inputs

    assert_equal(train(*adapted(), tier, tmp_path), train(*adapted(), None, tmp_path))
    model, inputs = adapted()
    zo = ZeroOrder(model, offload=tier)
    zo.step(lambda: model(**inputs).loss)
    streamed = {name for block in zo.streaming.blocks for name in block.holders}
    assert streamed
    assert not any("lora_" in name for name in streamed)
    zo.flush()
    assert zo.streaming.bytes_written == 0
    zo.close()


def test_micro_batches_of_a_step_are_summed(tmp_path: Path) -> None:
    results = []
    for tier in (None, "cpu"):
        model, inputs = make("llama")
        zo = ZeroOrder(model, lr=1e-3, offload=tier)
        for _ in range(3):
            for part in (slice(0, 1), slice(1, None)):
                piece = {name: value[part] for name, value in inputs.items()}
                zo.measure(lambda model=model, piece=piece: model(**piece).loss)
            zo.optimizer.step()
        results.append({name: value.clone() for name, value in model.state_dict().items()})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
