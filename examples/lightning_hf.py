"""A Hugging Face model inside a LightningModule, trained with forward passes only. Offline by default.

python examples/lightning_hf.py
python examples/lightning_hf.py --strategy zo_offload
python examples/lightning_hf.py --model facebook/opt-125m --learning-rate 1e-6
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that a clone works before it is installed

import lightning_zo  # noqa: F401  (registers the strategies)

LENGTH = 96


class LanguageModel(L.LightningModule):
    """An ordinary module, without any code for zeroth-order training."""

    def __init__(self, model: torch.nn.Module, lr: float):
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.model(input_ids=batch, labels=batch).loss, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strategy", default="zo", help="zo or zo_offload")
    parser.add_argument("--model", help="a causal language model on the Hub")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    args = parser.parse_args()
    text = "\n".join(pydoc_data.topics.topics.values())
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model)
        ids = torch.tensor(AutoTokenizer.from_pretrained(args.model)(text).input_ids)
    else:
        torch.manual_seed(0)
        shape = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=LENGTH, **shape))
        ids = torch.tensor(list(text.encode()))
    rows = list(ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH))
    module = LanguageModel(model, args.learning_rate)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            strategy=args.strategy, max_steps=args.steps, accelerator="auto", devices=1, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip
        held_out = DataLoader(rows[:64], batch_size=32)
        before = trainer.validate(module, held_out, verbose=False)[0]["val_loss"]
        trainer.fit(module, DataLoader(rows[64:], batch_size=16, shuffle=True))
        after = trainer.validate(module, held_out, verbose=False)[0]["val_loss"]
    print(f"held-out loss {before:.3f} before, {after:.3f} after {args.steps} steps")


if __name__ == "__main__":
    main()
