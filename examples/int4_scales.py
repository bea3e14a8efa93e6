"""Train a 4-bit model by moving its quantisation scales, with forward passes only.

A small causal language model learns English by backpropagation, is quantised to nf4 by transformers
and bitsandbytes, and is then adapted to source code without ever being dequantised: the scales move,
and the codes do not. It is saved, loaded again and exported to bf16.

    python examples/int4_scales.py
    python examples/int4_scales.py --model facebook/opt-125m --dataset wikitext --dataset-config wikitext-2-raw-v1

With --model and --dataset (network needed), that model is quantised and trained on that data instead.
Needs: pip install 'zo-trainer[hf,int4]'
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import pydoc_data.topics
import sys
import tempfile
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that a clone works before it is installed

from hf_zo import ZOTrainer, ZOTrainingArguments

Rows = list[dict[str, torch.Tensor]]

LENGTH = 128
SOURCES = "argparse ast dataclasses difflib functools heapq logging pathlib pickle random statistics tarfile typing"


def rows_of(tokens: list[int]) -> Rows:
    """Consecutive pieces, as a data set."""
    pieces = torch.tensor(tokens[: len(tokens) // LENGTH * LENGTH]).view(-1, LENGTH)
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def shuffled(rows: Rows) -> Rows:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return [rows[i] for i in order]


def offline(steps: int) -> tuple[PreTrainedModel, Rows]:
    """A Llama on bytes trained on documentation, and source code as the domain to adapt to."""
    english = rows_of(list("\n".join(pydoc_data.topics.topics.values()).encode()))
    code = rows_of(list("\n".join(inspect.getsource(importlib.import_module(m)) for m in SOURCES.split()).encode()))
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=256, max_position_embeddings=LENGTH, tie_word_embeddings=True, **shape)
    model = LlamaForCausalLM(config)
    print(f"Training {model.num_parameters():,} parameters on {len(english) * LENGTH:,} bytes of English …")
    args = arguments(TrainingArguments, steps, 2e-3, lr_scheduler_type="constant")
    quiet(Trainer(model, args, train_dataset=english)).train()
    return model, shuffled(code)


def arguments(cls: type[TrainingArguments], steps: int, lr: float, **more: object) -> TrainingArguments:
    return cls(
        output_dir=str(Path(tempfile.gettempdir()) / "zo-int4-scales"),
        max_steps=steps,
        learning_rate=lr,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=16,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        **more,
    )


def quiet(trainer: Trainer) -> Trainer:
    """Without the callback that prints every log."""
    trainer.remove_callback(PrinterCallback)
    return trainer


def quantised(model: str | Path) -> PreTrainedModel:
    """A model of the Hub or a folder, in nf4 with double quantisation."""
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(model, quantization_config=how)


def rows_from_hub(model: str, dataset: str, config: str | None) -> Rows:
    """A text data set of the Hub, in the tokens of a model."""
    from datasets import load_dataset

    text = "\n".join(load_dataset(dataset, config, split="train[:5000]")["text"])
    return shuffled(rows_of(AutoTokenizer.from_pretrained(model)(text)["input_ids"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600, help="zeroth-order steps, two forwards each")
    parser.add_argument("--pretraining-steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=1e-1, help="of the scales; tried for the small model only")
    parser.add_argument("--offload", choices=["cpu", "disk"], help="stream the codes of the layers")
    parser.add_argument("--model", help="a causal language model of the Hub, instead of the small one")
    parser.add_argument("--dataset", help="a text data set of the Hub, needed with --model")
    parser.add_argument("--dataset-config")
    args = parser.parse_args()
    if (args.model is None) != (args.dataset is None):
        parser.error("--model and --dataset go together")
    with tempfile.TemporaryDirectory() as folder:
        if args.model:
            rows = rows_from_hub(args.model, args.dataset, args.dataset_config)
            model = quantised(args.model)
        else:
            small, rows = offline(args.pretraining_steps)
            small.save_pretrained(folder)
            model = quantised(folder)
        held_out, train = rows[:64], rows[64:]
        settings = arguments(ZOTrainingArguments, args.steps, args.lr, zo_eps=1e-2, zo_offload=args.offload)
        trainer = quiet(ZOTrainer(model, settings, train_dataset=train, eval_dataset=held_out))
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
        assert trainer.zo is not None
        scales = sum(slot.tensor.numel() for slot in trainer.zo.slots)
        print(f"{scales:,} scales moved in {args.steps} steps: held-out loss {before:.3f} before, {after:.3f} after")

        trainer.zo.close()
        trainer.save_model(f"{folder}/trained")
        again = AutoModelForCausalLM.from_pretrained(f"{folder}/trained")
        same = all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
        print(f"Saved and loaded again, still in 4 bits: {'the same to the last bit' if same else 'DIFFERENT'}")
        model.dequantize(dtype=torch.bfloat16).to(torch.bfloat16).save_pretrained(f"{folder}/bf16")
        size = sum(path.stat().st_size for path in Path(folder, "bf16").glob("*.safetensors"))
        print(f"Exported to bf16: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
