"""Shared by the tests of `lightning_zo`: modules around the tiny models, quiet trainers, batches in a fixed order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hf_helpers import Weights, weights
from models import batch, tiny
from torch import Tensor, nn

from lightning_zo import ZOStrategy
from zo_core import ZOConfig

#: What Lightning warns about by itself in runs as small as these.
QUIET = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        ".*isinstance.treespec, LeafSpec.* is deprecated",
        "The '.*_dataloader' does not have many workers",
        "`training_step` returned `None`",
        "Checkpoint directory .* exists and is not empty",
        "You defined a `validation_step` but have no `val_dataloader`",
    )
]

MakeOptimizer = Callable[[nn.Module], Any]
TIERS = (None, "cpu")


def sgd(lr: float = 1e-3, **settings: Any) -> MakeOptimizer:
    return lambda module: torch.optim.SGD(module.parameters(), lr=lr, **settings)


class Wrapped(L.LightningModule):
    """An ordinary module around one of the tiny models."""

    def __init__(self, name: str = "llama", optimizer: MakeOptimizer | None = None, model: nn.Module | None = None):
        super().__init__()
        self.model = tiny(name) if model is None else model
        self.optimizer = optimizer or sgd()

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        output = self.model(**batch)
        return output if isinstance(output, Tensor) else output.loss

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    test_step = validation_step

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return self.optimizer(self)


def batches(name: str = "llama", count: int = 6) -> list[dict[str, Tensor]]:
    return [batch(name, index=index) for index in range(count)]


def loader(name: str = "llama", count: int = 6) -> Any:
    return torch.utils.data.DataLoader(batches(name, count), batch_size=None)


class Resumable:
    """A loader that remembers its position, so that a run can continue in the middle of an epoch."""

    def __init__(self, name: str = "llama", count: int = 6):
        self.data, self.at, self.resumed = batches(name, count), 0, False

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.at = self.at if self.resumed else 0
        self.resumed = False
        while self.at < len(self.data):
            self.at += 1
            yield self.data[self.at - 1]

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at, self.resumed = state["at"], True


class Tally:
    """A count that is not part of the module's state, so that it counts the call of every probe."""

    def __init__(self) -> None:
        self.count = 0

    def next(self) -> int:
        self.count += 1
        return self.count


def trainer(path: Path, strategy: Any = "zo", **settings: Any) -> L.Trainer:
    """A silent trainer; settings of the strategy come as a dict or `ZOConfig`."""
    if isinstance(strategy, (dict, ZOConfig)):
        strategy = ZOStrategy(strategy)
    quiet = {
        "default_root_dir": path,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
        "max_epochs": 1,
        "accelerator": "cpu",
    }
    return L.Trainer(strategy=strategy, **{**quiet, **settings})


def fitted(path: Path, module: L.LightningModule | None = None, strategy: Any = "zo", **settings: Any) -> Weights:
    """The weights after a run on the batches of a llama."""
    module = module or Wrapped()
    data = settings.pop("data", None) or loader()
    trainer(path, strategy, **settings).fit(module, data)
    return {name.removeprefix("model."): value for name, value in weights(module).items()}
