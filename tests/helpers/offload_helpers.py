"""Small streamed models, and runs of them to compare."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from models import batch, closure, tiny
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from zo_core import ZeroOrder

TIERS = ("cpu", "disk")

#: What `make` builds takes 30 to 120 kB; in this some blocks stay, and some are streamed.
SOME = "60KB"
STEPS = 20


def mixtral(layers: int) -> nn.Module:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            max_position_embeddings=64,
        )
    )


def make(
    name: str, tied: bool = True, dtype: torch.dtype = torch.float32, layers: int = 2
) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    if name == "mixtral":
        return mixtral(layers).to(dtype), batch("llama")
    return tiny(name, tied=tied, dtype=dtype, layers=layers), batch(name)


LAYERS = 6


def deep() -> tuple[nn.Module, dict[str, Tensor]]:
    """A Llama of six equal layers."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=64, **shape)), batch("llama")


def in_memory(parameter: Tensor) -> Tensor:
    """The data of a parameter while its values are elsewhere; an ordinary read would fetch them."""
    with torch._C.DisableTorchFunctionSubclass():
        return parameter.data


def train(
    model: nn.Module,
    inputs: dict[str, Tensor],
    offload: str | None,
    folder: Path,
    steps: int = STEPS,
    wrap: Callable[[], Any] | None = None,
    **settings: Any,
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and projected gradients, an evaluation in between, and the final weights."""
    place = {"offload": offload, **({"offload_dir": str(folder)} if offload == "disk" else {})}
    zo = ZeroOrder(model, **{"lr": 1e-3, **settings, **place})
    scheduler = torch.optim.lr_scheduler.LinearLR(zo.optimizer, 0.2, total_iters=steps)
    torch.manual_seed(1)
    numbers = []
    for step in range(steps):

        def closure() -> Tensor:
            if wrap is None:
                return model(**inputs).loss
            with wrap():
                return model(**inputs).loss

        record = zo.step(closure)
        scheduler.step()
        numbers += [record.loss, record.projected_grad]
        if step == steps // 2:
            with torch.no_grad():
                numbers.append(float(model(**inputs).loss))
    return numbers, {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(a: tuple[list[float], dict[str, Tensor]], b: tuple[list[float], dict[str, Tensor]]) -> None:
    assert a[0] == b[0]
    assert a[1].keys() == b[1].keys()
    assert [name for name in a[1] if not torch.equal(a[1][name], b[1][name])] == []


def places(folder: Path) -> list[dict[str, Any]]:
    """Settings of one engine for each place that a model can be in, the resident one first."""
    return [
        {},
        {"offload": "cpu"},
        {"offload": "disk", "offload_dir": str(folder)},
        {"offload": "auto", "device_memory": SOME},
    ]


def scheduled(zo: ZeroOrder, steps: int) -> list[float]:
    """The losses of some steps with a learning rate that grows; the engine is closed afterwards."""
    scheduler = LinearLR(zo.optimizer, 0.2, total_iters=steps)
    losses = []
    for step in range(steps):
        losses.append(float(zo.step(closure("llama", zo.model, step))))
        scheduler.step()
    zo.close()
    return losses
