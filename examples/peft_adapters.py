"""Trains a PEFT adapter (LoRA, a prefix, or LoRA along the activations) with forward passes only. Offline.

    python examples/peft_adapters.py --method lora
    python examples/peft_adapters.py --method prefix
    python examples/peft_adapters.py --method activations

A small causal language model learns English by backpropagation; the adapter then learns Python source code, is saved,
and loaded again.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
import pydoc_data.topics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that a clone works before it is installed

from hf_zo import ZOTrainer, ZOTrainingArguments, activation_adapter

LENGTH = 96
SOURCES = [
    "argparse",
    "ast",
    "dataclasses",
    "difflib",
    "functools",
    "heapq",
    "logging",
    "pathlib",
    "pickle",
    "random",
    "statistics",
    "tarfile",
]

#: Adapter, learning rate and eps. Adapters need larger ones than full weights; None takes the defaults.
METHODS: dict[str, tuple[Any, float | None, float | None]] = {
    "lora": (LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"]), 3e-3, 1e-2),
    "prefix": (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8), 3e-2, 1e-1),
    "activations": (None, None, None),
}


def rows(text: str) -> list[dict[str, torch.Tensor]]:
    tokens = torch.tensor(list(text.encode()))
    blocks = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": block, "labels": block} for block in blocks[order]]


def settings(folder: str, cls: type[TrainingArguments], **more: Any) -> Any:
    quiet = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "logging_strategy": "no"}
    return cls(output_dir=folder, per_device_train_batch_size=16, dataloader_pin_memory=False, **quiet, **more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=METHODS, default="lora")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--pretraining-steps", type=int, default=200)
    args = parser.parse_args()
    adapter, lr, eps = METHODS[args.method]
    torch.manual_seed(0)
    shape = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=2 * LENGTH, **shape))
    with tempfile.TemporaryDirectory() as folder:
        english = rows("\n".join(pydoc_data.topics.topics.values()))
        first = settings(folder, TrainingArguments, max_steps=args.pretraining_steps, learning_rate=2e-3)
        pretraining = Trainer(base, first, train_dataset=english)
        pretraining.remove_callback(PrinterCallback)
        pretraining.train()
        code = rows("\n".join(inspect.getsource(importlib.import_module(name)) for name in SOURCES))
        if adapter is None:
            batches = [{"input_ids": torch.stack([row["input_ids"] for row in code[-32:]])}]
            model = activation_adapter(copy.deepcopy(base), batches, rank=8, task_type="CAUSAL_LM")
        else:
            model = get_peft_model(copy.deepcopy(base), adapter)
        rates = {} if lr is None else {"learning_rate": lr, "zo_eps": eps}
        trainer = ZOTrainer(
            model=model,
            args=settings(folder, ZOTrainingArguments, max_steps=args.steps, **rates),
            train_dataset=code[64:],
            eval_dataset=code[:64],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.model.print_trainable_parameters()
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
        trainer.save_model(f"{folder}/adapter")
        loaded = PeftModel.from_pretrained(base, f"{folder}/adapter").eval()
        ids = code[0]["input_ids"].unsqueeze(0)
        with torch.no_grad():
            same = torch.equal(loaded(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)
    print(f"held-out loss {before:.3f} before, {after:.3f} after {args.steps} steps")
    print(f"the saved adapter, loaded by PEFT, computes the same: {same}")


if __name__ == "__main__":
    main()
