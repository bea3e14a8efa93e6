"""How much quantisation to nf4 loses on held-out text, and how much of it training recovers.

A small Llama learns English (the documentation of Python's language topics) byte by byte, by
backpropagation. It is quantised to nf4, and its held-out loss rises. From there:

* ZO on the quantisation scales (`target="int4_scales"`), forward passes only;
* ZO on LoRA adapters of the quantised model, forward passes only;
* QLoRA, the same adapters by backpropagation, with a third of the passes, because a backward pass costs
  about two forwards.

    python -m benchmarks.int4_learning          # a table, 3 seeds
"""

from __future__ import annotations

import argparse
import logging
import pydoc_data.topics
import tempfile
import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from zo_core import ZeroOrder
from zo_core.targets import keep_codes_plain

from .report import save

LENGTH, BATCH = 64, 32
HELD_OUT = 192


def text() -> tuple[Tensor, Tensor]:
    """Training and held-out rows of bytes ``[rows, 64]``."""
    data = torch.tensor(list("\n".join(pydoc_data.topics.topics.values()).encode()))
    rows = data[: len(data) // LENGTH * LENGTH].view(-1, LENGTH)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    return rows[HELD_OUT:], rows[:HELD_OUT]


def batches(rows: Tensor, steps: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [rows[torch.randint(len(rows), (BATCH,), generator=generator)] for _ in range(steps)]


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    return model(input_ids=rows, labels=rows).loss


def held_out_loss(model: nn.Module, rows: Tensor) -> float:
    training = model.training
    model.eval()
    with torch.no_grad():
        result = sum(float(loss_of(model, part)) for part in rows.split(64)) / len(rows.split(64))
    model.train(training)
    return result


def backprop(model: nn.Module, data: list[Tensor], lr: float) -> None:
    """AdamW with a cosine schedule to zero."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(data))
    model.train()
    for rows in data:
        loss_of(model, rows).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def zeroth_order(model: nn.Module, data: list[Tensor], **settings: object) -> None:
    zo = ZeroOrder(model, **settings)  # type: ignore[arg-type]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(zo.optimizer, len(data))
    for rows in data:
        zo.step(lambda: loss_of(model, rows))  # noqa: B023
        schedule.step()


def pretrained(seed: int, train: Tensor, steps: int) -> str:
    """A folder with a Llama of 123,000 parameters that was trained on the text."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    backprop(model, batches(train, steps, seed), 4e-3)
    folder = tempfile.mkdtemp(prefix="zo-int4-")
    model.save_pretrained(folder)
    return folder


def quantised(folder: str) -> nn.Module:
    """The model in nf4, doubly quantised, with scales that an evaluation does not round."""
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=how)
    keep_codes_plain(model)
    return model


def with_adapters(model: nn.Module, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000, help="zeroth-order steps, two forwards each")
    parser.add_argument("--pretraining-steps", type=int, default=700)
    parser.add_argument("--lr", type=float, default=2e-2, help="of the scales")
    parser.add_argument("--lora-lr", type=float, default=3e-3, help="of the adapters, zeroth-order")
    parser.add_argument("--qlora-lr", type=float, default=1e-3, help="of the adapters, by backpropagation")
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    args = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    train, held_out = text()
    rows = []
    for seed in range(args.seeds):
        folder = pretrained(seed, train, args.pretraining_steps)
        original = held_out_loss(LlamaForCausalLM.from_pretrained(folder), held_out)
        start = held_out_loss(quantised(folder), held_out)
        data = batches(train, args.steps, 1000 + seed)
        results = []
        model = quantised(folder)
        zeroth_order(model, data, lr=args.lr, eps=1e-2, seed=seed)
        results.append(held_out_loss(model, held_out))
        model = with_adapters(quantised(folder), seed)
        zeroth_order(model, data, lr=args.lora_lr, eps=1e-2, seed=seed)
        results.append(held_out_loss(model, held_out))
        model = with_adapters(quantised(folder), seed)
        backprop(model, data[: 2 * args.steps // 3], args.qlora_lr)
        results.append(held_out_loss(model, held_out))
        shown = [f"{loss:.4f} ({(start - loss) / (start - original):+.0%})" for loss in results]
        rows.append([str(seed), f"{original:.4f}", f"{start:.4f}", *shown])
    columns = ["seed", "float32", "nf4", "ZO on scales", "ZO on LoRA", "QLoRA (AdamW)"]
    title = f"Held-out loss, and the part of the gap that came back, after {2 * args.steps} forwards or as much"
    save("int4-learning", title, columns, rows, torch.device("cpu"), write=args.save)


if __name__ == "__main__":
    main()
