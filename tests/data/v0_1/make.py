"""Wrote the files beside it, checkpoints without a mark, with version 0.1.

    PYTHONPATH=its-checkout:its-checkout/tests python make.py

Everything here loads with ``torch.load(..., weights_only=True)``.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from pathlib import Path

import torch
from hf_helpers import arguments, texts
from lightning_helpers import Wrapped, loader, sgd, trainer
from models import VOCAB, closure, tiny
from transformers import LlamaConfig, LlamaForCausalLM

from hf_zo import ZOTrainer, ZOTrainingArguments
from zo_core import SeedLogWriter, ZeroOrder, ZOOptimizer, version

HERE = Path(__file__).parent
LOW_RANK = {"name": "low_rank", "refresh": 3}


def bare() -> None:
    """Four steps in a bare loop: what `ZeroOrder.state_dict` returned, beside the weights and the seed log."""
    runs = {
        "momentum": {"rule": "momentum", "num_probes": 2},
        "low_rank": {"rule": "momentum", "noise": LOW_RANK},
        "sparse": {"noise": "sparse"},
        "adamw": {},
    }
    for name, settings in runs.items():
        model = tiny("mlp")
        if name == "adamw":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        else:
            groups = [{"params": model.inner.parameters()}, {"params": model.head.parameters(), "eps": 1e-2}]
            optimizer = ZOOptimizer(groups, lr=1e-2, eps=1e-3, weight_decay=0.1)
        zo = ZeroOrder(model, optimizer=optimizer, seed=5, **settings)
        log = SeedLogWriter.attach(zo, HERE / f"{name}.zo") if name == "momentum" else None
        for index in range(4):
            zo.step(closure("mlp", model, index))
        if log is not None:
            log.close()
        torch.save({"model": model.state_dict(), "zo": zo.state_dict()}, HERE / f"{name}.pt")


def lightning() -> None:
    """Two steps, with SGD and with a `ZOOptimizer`."""
    for name, make in (("sgd", sgd(momentum=0.9)), ("own", lambda module: ZOOptimizer(module.parameters(), lr=1e-3))):
        with tempfile.TemporaryDirectory() as folder:
            run = trainer(Path(folder), {"seed": 5}, max_steps=2)
            module = Wrapped("mlp", make)
            module.on_train_end = lambda run=run, name=name: run.save_checkpoint(HERE / f"lightning_{name}.ckpt")
            run.fit(module, loader("mlp"))


def hugging_face() -> None:
    """Three steps of four, with a checkpoint after the second: the output folder, without what is not needed."""
    config = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, max_position_embeddings=32, **config))
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(
            Path(folder), ZOTrainingArguments, save_strategy="steps", save_steps=2, max_steps=3, zo_rule="momentum",
            learning_rate=1e-3,
        )  # fmt: skip
        ZOTrainer(model=model, args=args, train_dataset=texts()).train()
        out = Path(folder) / "out"
        shutil.rmtree(out / "checkpoint-3", ignore_errors=True)
        for name in ("training_args.bin", "rng_state.pth", "generation_config.json"):
            (out / "checkpoint-2" / name).unlink(missing_ok=True)
        shutil.copytree(out, HERE / "hf", dirs_exist_ok=True)


if __name__ == "__main__":
    assert version.__version__.startswith("0.1"), version.__version__
    warnings.simplefilter("ignore")
    bare()
    lightning()
    hugging_face()
