"""Copies of a skeleton with int4 codes and scales, or with LoRA adapters."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import Tensor, nn

from zo_core import ConfigError

#: Number of weights that share one scale: the default of bitsandbytes.
BLOCK_SIZE = 64

#: What PEFT adapts by default: the projections of queries and values, under their various names.
LORA_TARGETS = ("q_proj", "v_proj", "query", "value", "q", "v", "q_lin", "v_lin", "query_key_value", "qkv_proj")


class Int4Linear(nn.Module):
    """A linear layer of bitsandbytes: two codes per byte, a float32 scale for each 64 weights.

    Its forward dequantises the weights of the whole layer to their 16-bit dtype, as bitsandbytes does for
    more than one token.
    """

    def __init__(self, base: nn.Linear):
        super().__init__()
        count, device = base.weight.numel(), base.weight.device
        self.shape, self.dtype = base.weight.shape, base.weight.dtype
        self.weight = nn.Parameter(torch.empty((-(-count // 2), 1), dtype=torch.uint8, device=device), False)
        self.scales = nn.Parameter(torch.empty(-(-count // BLOCK_SIZE), dtype=torch.float32, device=device))
        self.bias = base.bias

    def freeze(self) -> None:
        """Makes the scales a buffer: they do not move, and stay on the device when codes are streamed."""
        scales = self.scales.data
        del self.scales
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, x.new_empty(self.shape, dtype=self.dtype), self.bias)


class LoraLinear(nn.Module):
    """A frozen layer and its adapter, which PEFT keeps in float32."""

    def __init__(self, base: nn.Module, rows: int, columns: int, rank: int, device: torch.device):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(columns, rank, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(rank, rows, bias=False, device=device, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base_layer(x)
        return result + self.lora_B(self.lora_A(x.to(torch.float32))).to(result.dtype)


def with_int4(model: nn.Module) -> nn.Module:
    """Returns a copy whose linear layers are int4, except the head; only scales move.

    Raises:
        ConfigError: the model has no linear layer.
    """
    model = copy.deepcopy(model).requires_grad_(False)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    find_head = getattr(model, "get_output_embeddings", lambda: None)
    head = find_head()
    names = [
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and m is not head and id(m.weight) not in embeddings
    ]
    if not names:
        raise ConfigError(["the model has no linear layer (nn.Linear, apart from the head) that could be int4"])
    for name in names:
        _replace(model, name, Int4Linear(_linear(model, name)))
    return model


def with_lora(model: nn.Module, rank: int, targets: Collection[str] = LORA_TARGETS) -> nn.Module:
    """Returns a copy with adapters on the layers with these names; only the adapters move.

    Raises:
        ConfigError: a name is that of no layer. Of the default names one is enough.
    """
    model = copy.deepcopy(model).requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Int4Linear):
            module.freeze()
    names = [
        name
        for name, m in model.named_modules()
        if isinstance(m, (nn.Linear, Int4Linear)) and name.rpartition(".")[2] in targets
    ]
    found = {name.rpartition(".")[2] for name in names}
    missing = [target for target in targets if target not in found]
    if not names or (missing and targets != LORA_TARGETS):
        linear = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, (nn.Linear, Int4Linear))}
        known = ", ".join(sorted(linear)) or "none"
        raise ConfigError([f"lora_targets={','.join(missing)} are not in the model; its linear layers are: {known}"])
    for name in names:
        base = model.get_submodule(name)
        shape = base.shape if isinstance(base, Int4Linear) else _linear(model, name).weight.shape
        device = next(base.parameters()).device
        _replace(model, name, LoraLinear(base, shape[0], shape[1], rank, device))
    return model


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)
