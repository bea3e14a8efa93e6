"""TRL's SFTTrainer with forward passes only: one class of two lines. Offline by default.

python examples/trl_sft.py
torchrun --standalone --nproc_per_node 2 examples/trl_sft.py
python examples/trl_sft.py --model Qwen/Qwen2.5-0.5B --dataset trl-lib/Capybara --learning-rate 1e-6
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that a clone works before it is installed

from hf_zo import ZOTrainerMixin


class ZOSFTTrainer(ZOTrainerMixin, SFTTrainer):
    """Everything that SFTTrainer does, without a backward pass."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE({**vocabulary, "<eos>": 256, "<pad>": 257}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def offline() -> tuple[Any, Any, Dataset]:
    """A small random model, and Python's documentation."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=258, max_position_embeddings=128, **shape))
    paragraphs = [part.strip() for text in pydoc_data.topics.topics.values() for part in text.split("\n\n")]
    return model, byte_tokenizer(), Dataset.from_dict({"text": [part for part in paragraphs if len(part) > 40]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--dataset")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    args = parser.parse_args()
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model)
        tokenizer, data = AutoTokenizer.from_pretrained(args.model), load_dataset(args.dataset, split="train[:2000]")
    else:
        model, tokenizer, data = offline()
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            max_steps=args.steps,
            learning_rate=args.learning_rate,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            max_length=128,
            per_device_train_batch_size=8,
            logging_steps=max(1, args.steps // 5),
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=False,
        )
        trainer = ZOSFTTrainer(model, config, train_dataset=data, processing_class=tokenizer)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if trainer.is_world_process_zero():
        print(f"training loss {losses[0]:.3f} at first, {losses[-1]:.3f} at the end")


if __name__ == "__main__":
    main()
