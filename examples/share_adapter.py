"""A full fine-tune as a file of a few kilobytes: train, share, load, look at an earlier step. Offline.

python examples/share_adapter.py
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that a clone works before it is installed

from hf_zo import ZOTrainer, ZOTrainingArguments, load_zo_adapter, save_zo_adapter
from zo_core.seedlog.__main__ import main as seedlog


def base_model() -> LlamaForCausalLM:
    """A placeholder for `AutoModelForCausalLM.from_pretrained(...)`: the same weights at every call."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=256, max_position_embeddings=64))


def rows() -> list[dict[str, torch.Tensor]]:
    tokens = torch.tensor(list(Path(__file__).read_bytes()))
    pieces = tokens[: len(tokens) // 64 * 64].view(-1, 64)
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        args = ZOTrainingArguments(
            output_dir=f"{folder}/run", max_steps=steps, learning_rate=3e-4, per_device_train_batch_size=8,
            save_strategy="no", report_to=[], disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = ZOTrainer(model=base_model(), args=args, train_dataset=rows())
        trainer.train()
        shared = save_zo_adapter(trainer, f"{folder}/shared")
        for path in sorted(shared.iterdir()):
            print(f"{path.name:20}{path.stat().st_size:>8,} bytes")
        weights = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
        print(f"{'the weights':20}{weights:>8,} bytes\n")

        loaded = load_zo_adapter(base_model(), shared)
        print(f"loaded on the base model, equal to the trained one bit for bit: {same(loaded, trainer.model)}")
        half = load_zo_adapter(base_model(), shared, until=steps // 2)
        print(f"the weights at step {steps // 2} are others: {not same(half, trainer.model)}\n")
        seedlog(["show", str(shared / "seedlog.zo")])


if __name__ == "__main__":
    main()
