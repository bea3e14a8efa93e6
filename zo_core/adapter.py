"""Exports what a run with a single window has learnt as a LoRA adapter in PEFT's file format.

With ``LowRank(refresh=None)`` all updates of a linear layer form one low-rank product, and the base weights
are never written. Writing the files does not need PEFT itself.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import StateError
from .files import replacing, write_whole
from .noise import LowRank, LowRankDirection

if TYPE_CHECKING:
    from .engine import ZeroOrder


def save_adapter(engine: ZeroOrder, folder: str | os.PathLike[str]) -> None:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors`` for ``PeftModel.from_pretrained``.

    Loaded onto the base model, they give the trained weights up to the rounding of float32 sums. Call this
    before ``engine.close()``, which merges the updates into the weights.

    Args:
        engine: trained with ``noise=LowRank(refresh=None)``, no weight decay, and only the weights of
            linear layers (`nn.Linear`, or the ``Conv1D`` of transformers) as trainable parameters.
        folder: created if it does not exist.

    Raises:
        StateError: the run cannot be written as an adapter; the message lists everything that prevents it.
    """
    tensors, targets, problems = {}, [], _problems(engine)
    if engine.backprop is not None:
        problems.append("the weights under backprop are not of low rank; save the model instead")
    kinds = set()
    names = {id(module): name for name, module in engine.model.named_modules()}
    for slot in engine.slots:
        waiting = engine.updaters.waiting(slot)
        module = slot.modules[0]
        transposed = type(module).__name__ == "Conv1D"
        linear = isinstance(module, nn.Linear) or transposed
        if len(slot.modules) > 1 or not linear or slot.tensor is not getattr(module, "weight", None):
            problems.append(f"{slot.key} is not the weight of one linear layer; requires_grad_(False) leaves it alone")
        elif waiting is not None:
            if waiting.decay != 1.0:
                problems.append(f"{slot.key} has shrunk by weight decay; train with weight_decay=0")
            kinds.add(transposed)
            down, up = _factors(waiting, transposed)
            targets.append(names[id(module)])
            tensors[f"base_model.model.{targets[-1]}.lora_A.weight"] = down
            tensors[f"base_model.model.{targets[-1]}.lora_B.weight"] = up
    if not problems and not tensors:
        problems.append("nothing was learnt yet")
    if len(kinds) > 1:
        problems.append("the model mixes Linear and Conv1D layers, and one adapter cannot; train one kind of them")
    if problems:
        raise StateError("this run is not a LoRA adapter: " + "; ".join(problems))
    rank = len(next(iter(tensors.values())))
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(targets),
        "fan_in_fan_out": kinds == {True},
        "inference_mode": True,
        "base_model_name_or_path": getattr(getattr(engine.model, "config", None), "name_or_path", None) or None,
    }
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    with replacing(path / "adapter_model.safetensors") as fresh:
        save_file(tensors, fresh, metadata={"format": "pt"})
    write_whole(path / "adapter_config.json", (json.dumps(config, indent=2) + "\n").encode())


def _problems(engine: ZeroOrder) -> list[str]:
    noise = engine.noise
    if not isinstance(noise, LowRank) or noise.refresh is not None:
        return [f"its noise is {noise!r}; train with noise=LowRank(refresh=None), in one window"]
    if not engine.updaters.windows.of:
        return [f"rule={engine.rule.name!r} and compiled models write into the base; use the rule 'sgd' or 'momentum'"]
    if engine.written:
        return [
            "some of its updates are in the base weights: a rollback, a second run, other trainable weights or close() "
            "has merged them; save the model instead"
        ]
    return []


def _factors(waiting: LowRankDirection, transposed: bool) -> tuple[Tensor, Tensor]:
    """``lora_A`` and ``lora_B``, whose product ``B A`` PEFT adds, transposed for ``Conv1D``."""
    assert waiting.base is not None
    left, right = (factor.detach().float().cpu() for factor in waiting.base)
    down, up = (left.t(), right.t()) if transposed else (right, left)
    return down.contiguous().clone(), up.contiguous().clone()
