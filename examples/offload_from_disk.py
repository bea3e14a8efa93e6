"""Trains a checkpoint from disk without ever holding the whole of it in memory.

    python examples/offload_from_disk.py                                        # offline: writes a small one first
    python examples/offload_from_disk.py --model meta-llama/Llama-3.1-8B        # any causal LM on the Hub

The checkpoint is not changed; layers that training changes are written to a separate folder. Prints the loss on
held-out text before and after, and the peak memory of the process on top of its imports.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that a clone works before it is installed

from hf_zo import ZOTrainer, ZOTrainingArguments, from_pretrained_offloaded

BLOCK = 128


def write_small_checkpoint(folder: str, layers: int) -> str:
    """A Llama over bytes with random weights, 19 MB a layer."""
    torch.manual_seed(0)
    shape = {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": layers, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=256, max_position_embeddings=BLOCK, tie_word_embeddings=True, **shape)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="100MB")
    return folder


def rows(name: str | None, count: int) -> list[dict[str, torch.Tensor]]:
    """English text in blocks of tokens (bytes for the small model)."""
    text = "\n".join(topics.values())
    ids = torch.tensor(list(text.encode()) if name is None else AutoTokenizer.from_pretrained(name)(text).input_ids)
    blocks = ids[: len(ids) // BLOCK * BLOCK].view(-1, BLOCK)[:count]
    return [{"input_ids": block, "labels": block} for block in blocks]


class Peak(threading.Thread):
    """The peak resident memory while it runs, in MB above that at the start."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.first = self.now()
        self.peak, self.stop = 0.0, threading.Event()

    @staticmethod
    def now() -> float:
        """In MB; Linux only."""
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def run(self) -> None:
        while not self.stop.wait(0.01):
            self.peak = max(self.peak, self.now() - self.first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a checkpoint on the Hub or in a folder; default: a small random one")
    parser.add_argument("--layers", type=int, default=16, help="of the small one")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = args.model or write_small_checkpoint(f"{folder}/checkpoint", args.layers)
        data = rows(args.model, 320)
        peak = Peak()
        peak.start()
        model = from_pretrained_offloaded(AutoModelForCausalLM, path, offload_dir=f"{folder}/blocks")
        settings = ZOTrainingArguments(
            output_dir=f"{folder}/out",
            max_steps=args.steps,
            learning_rate=args.learning_rate,
            per_device_train_batch_size=4,
            logging_steps=max(1, args.steps // 4),
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=False,
        )
        trainer = ZOTrainer(model=model, args=settings, train_dataset=data[16:], eval_dataset=data[:16])
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
        peak.stop.set()
        size = sum(file.stat().st_size for file in Path(path).glob("*.safetensors")) / 2**20 if not args.model else None
        print(f"held-out loss {before:.4f} before, {after:.4f} after {args.steps} steps")
        print(f"peak memory on top of the imports {peak.peak:.0f} MB" + (f", checkpoint {size:.0f} MB" if size else ""))


if __name__ == "__main__":
    main()
