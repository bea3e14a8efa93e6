"""Long runs, each in a process of its own: prints its anonymous memory, in MB, after every twentieth of its steps.

echo '{"front": "bare", "noise": "rademacher", "rule": "sgd", "offload": null, "steps": 2000}' | python long_run.py bare

The argument is the front end of all runs. The process imports what it needs, and each line of its standard input is
run by a child, which has it.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import itertools
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from processes import together
from torch import Tensor, nn

from zo_core import ZeroOrder, ZOConfig

#: Width of the blocks by size of the model: 80 thousand and 101 million parameters, in equal blocks.
SHAPES = {"small": (6, 112), "large": (12, 2900)}


class Model(nn.Module):
    """A model with blocks that can be streamed; takes a batch by name and returns the loss, as trainers require."""

    def __init__(self, size: str):
        super().__init__()
        count, self.width = SHAPES[size]
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(self.width, self.width), nn.GELU()) for _ in range(count))
        self.head = nn.Linear(self.width, 8)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            x = block(x)
        return {"loss": nn.functional.cross_entropy(self.head(x), labels)}


TRIM = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)  # glibc alone has it


def anonymous() -> float:
    """RssAnon of this process in MB, without garbage and without freed memory, which come and go by MBs."""
    gc.collect()
    TRIM(0)
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) / 1024


def rows(model: Model, count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(count, model.width, generator=generator)
    return [{"x": x, "labels": torch.tensor(index % 8)} for index, x in enumerate(xs)]


def bare(model: Model, config: ZOConfig, rule: str, steps: int, after: Callable[[], object]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9) if rule == "torch" else None
    zo = ZeroOrder(model, config, optimizer=optimizer)
    batches = torch.utils.data.DataLoader(rows(model, 64), batch_size=8)
    done = 0
    while done < steps:
        for batch in batches:
            zo.step(lambda: model(**batch)["loss"])  # noqa: B023
            after()
            done += 1
    zo.close()


def hf(model: Model, config: ZOConfig, rule: str, steps: int, after: Callable[[], object]) -> None:
    from transformers import TrainerCallback, TrainingArguments

    from hf_zo import ZOTrainer

    class After(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            after()

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            learning_rate=1e-4,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        )
        chosen = {"optimizers": (torch.optim.SGD(model.parameters(), lr=1e-4), None)} if rule == "torch" else {}
        trainer = ZOTrainer(
            model=model, args=args, train_dataset=rows(model, 64), callbacks=[After()], zo_config=config, **chosen
        )
        trainer.train()


def lightning(model: Model, config: ZOConfig, rule: str, steps: int, after: Callable[[], object]) -> None:
    import lightning as L

    from lightning_zo import ZOStrategy

    optimizers = {"torch": torch.optim.Adam, "momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9)}

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return self.model(**batch)["loss"]

        def on_train_batch_end(self, *args: Any) -> None:
            after()

        def configure_optimizers(self) -> Any:
            return optimizers.get(rule, torch.optim.SGD)(self.parameters(), lr=1e-4)

    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            default_root_dir=folder,
            max_steps=steps,
            accelerator="cpu",
            strategy=ZOStrategy(config),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Module(), torch.utils.data.DataLoader(rows(model, 64), batch_size=8))


def measured(asked: dict[str, Any]) -> list[float]:
    """Memory in the course of one run; in several processes that of the largest."""
    size = asked.get("processes", 1)
    if size == 1:
        return alone(asked)
    with tempfile.TemporaryDirectory() as folder:
        found = together(lambda _: alone(asked), Path(folder), size=size, seconds=1100)
    return [max(each) for each in zip(*found, strict=True)]


def alone(asked: dict[str, Any]) -> list[float]:
    """Memory in the course of a run in this process."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Model(asked.get("size", "small"))
    rule = asked["rule"]
    named = rule != "torch" and asked["front"] != "lightning"  # which takes it from its optimizer
    settings = {"rule": rule} if named else {}
    lr = {"lr": 1e-4} if asked["front"] == "bare" and rule != "torch" else {}
    config = ZOConfig(noise=asked["noise"], offload=asked["offload"], **settings, **lr, **asked.get("more", {}))
    seen: list[float] = []
    steps = itertools.count(1)
    apart = max(1, asked["steps"] // 20)

    def after() -> None:
        if next(steps) % apart == 0:
            seen.append(anonymous())

    fronts = {"bare": bare, "hf": hf, "lightning": lightning}
    fronts[asked["front"]](model, config, rule, asked["steps"], after)
    return seen


def main(front: str) -> None:
    for module in {"hf": ["transformers", "hf_zo"], "lightning": ["lightning", "lightning_zo"]}.get(front, []):
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # else each measurement looks through all that was imported
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                print(json.dumps(measured(json.loads(line))), flush=True)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            print("null", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
