"""Models that transformers has quantised with bitsandbytes, and trainers for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hf_helpers import arguments, texts
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_zo import ZOTrainer
from zo_core.targets import keep_codes_plain


def load(folder: Path, nested: bool = True, **more: Any) -> Any:
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantisation, dtype=torch.float32, **more)


def nf4(folder: Path) -> Any:
    """With its codes as they are on disk, also on a CPU where bitsandbytes would repack them in eval mode."""
    model = load(folder, nested=False)
    keep_codes_plain(model)
    return model


def made(path: Path, model: nn.Module, cls: type[Any] = ZOTrainer, **settings: Any) -> Any:
    own = {name: settings.pop(name) for name in ("zo_config", "eval_dataset") if name in settings}
    args = arguments(path, **{"learning_rate": 1e-2, **settings})
    return cls(model=model, args=args, train_dataset=texts(), **own)


def trained(path: Path, model: nn.Module, **settings: Any) -> Any:
    trainer = made(path, model, **settings)
    trainer.train()
    return trainer
