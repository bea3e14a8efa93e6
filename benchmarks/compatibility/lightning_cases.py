"""Lightning's callbacks with the strategy, on a small network with blocks that can be streamed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch import callbacks as cb
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_zo import ZOStrategy
from zo_core import NOISES, Noise, ZOConfig

from .models import folder
from .written_out import EPS, LR, SEED, Copies, Run, keys_of, same_start

STEPS = 6


class Block(nn.Module):
    """A block that can be streamed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Net(L.LightningModule):
    """Regression; the loss may be a Python number."""

    def __init__(self, number: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.number = number
        self.backbone = nn.Sequential(Block(), Block(), Block())
        self.head = nn.Linear(8, 1)
        self.lr, self.batch_size = 3 * LR, 8

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        loss = (self.head(self.backbone(batch[0])) - batch[1]).square().mean()
        self.log("train_loss", loss)
        return float(loss) if self.number else loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", (self.head(self.backbone(batch[0])) - batch[1]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.SGD(trained, lr=self.lr)

    def train_dataloader(self) -> DataLoader[Any]:
        draw = torch.Generator().manual_seed(1)
        x = torch.randn(256, 8, generator=draw)
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=self.batch_size)

    val_dataloader = train_dataloader


class Written(Net):
    """The same module, with each step in plain code."""

    noise: Noise
    keys: list[dict[str, str]]
    result: Run
    sums: tuple[float, float] = (0.0, 0.0)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        self.now = self.keys[min(len(self.result.grads), len(self.keys) - 1)]
        copies = Copies([self], self.moved(), self.noise, lambda: Net.training_step(self, batch, batch_idx))
        losses = copies.both(self.noise.seed(SEED, self.trainer.global_step, 0))
        count = self.trainer.accumulate_grad_batches
        self.sums = self.sums[0] + losses[0] / count, self.sums[1] + losses[1] / count
        return sum(p.sum() * 0.0 for p in self.parameters() if p.requires_grad) + sum(losses) / 2

    def moved(self) -> dict[str, Tensor]:
        """The tensors that a step moves, with the keys of their slots."""
        named = {f"0.{name}": tensor for name, tensor in self.named_parameters()}
        return {key: named[name] for name, key in self.now.items() if named[name].requires_grad}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return _Move(super().configure_optimizers().param_groups, self)


class _Move(torch.optim.SGD):
    """Moves the weights according to the module's measurements, with the learning rate of each group."""

    def __init__(self, groups: list[dict[str, Any]], module: Written):
        super().__init__(groups)
        self.module = module

    def step(self, closure: Any = None) -> Any:
        loss, module = closure(), self.module
        (plus, minus), module.sums = module.sums, (0.0, 0.0)
        grad = (plus - minus) / (2 * EPS)
        seed = module.noise.seed(SEED, module.trainer.global_step, 0)
        module.result.grads.append(grad)
        module.result.losses.append((plus + minus) / 2)
        rates = {id(tensor): group["lr"] for group in self.param_groups for tensor in group["params"]}
        for key, tensor in module.moved().items():
            scale = -rates[id(tensor)] * float(np.float32(grad))
            tensor.data.add_(module.noise.values(seed, key, tensor.shape, scale=scale))
        return loss


class _Records(cb.Callback):
    """Keeps the results of the steps of a run."""

    def __init__(self, run: Run):
        self.run, self.zo = run, None

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        if self.zo is not trainer.strategy.zo:
            self.zo = trainer.strategy.zo
            self.zo.listeners[:] = [lambda record: self._record(record, trainer, module)]

    def _record(self, record: Any, trainer: L.Trainer, module: Any) -> None:
        self.run.keys.append(keys_of(trainer.strategy.zo, [module]))
        self.run.grads.append(record.projected_grad)
        self.run.losses.append(record.loss)


class Average(cb.Callback):
    """A typical average of the weights."""

    def __init__(self) -> None:
        self.mean: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        for name, value in module.named_parameters():
            self.mean[name] = (self.mean.get(name, value.detach()) + value.detach()) * 0.5


@dataclass(frozen=True)
class Case:
    """One callback, or one setting of the trainer.

    Attributes:
        trainer: its name in the table.
        setting: what differs from its defaults.
        callbacks: makes the callbacks.
        remark: what its users should know.
        settings: settings of the trainer.
        net: settings of the module.
    """

    trainer: str
    setting: str
    callbacks: Callable[[], list[Any]] = list
    remark: str = ""
    settings: tuple[tuple[str, Any], ...] = ()
    net: tuple[tuple[str, Any], ...] = ()

    def mine(self, **settings: Any) -> Run:
        """The run of this package."""
        run, module = Run(), Net(**dict(self.net))
        strategy = ZOStrategy(ZOConfig(eps=EPS, seed=SEED, **settings), log=False)
        return self._finished(module, run, [_Records(run)], strategy=strategy)

    def written_out(self, noise: str, keys: list[dict[str, str]]) -> Run:
        """The run that it should be equal to."""
        module = Written(**dict(self.net))
        module.noise, module.keys, module.result = NOISES.resolve(noise), keys, Run()
        return self._finished(module, module.result, [])

    def _finished(self, module: Net, run: Run, more: list[Any], **settings: Any) -> Run:
        same_start()
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        callbacks = self.callbacks()
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        quiet["enable_checkpointing"] = False
        given = {**quiet, "max_steps": STEPS, "limit_val_batches": 2, "log_every_n_steps": 1, **dict(self.settings)}
        trainer = L.Trainer(default_root_dir=folder(), callbacks=[*callbacks, *more], **given, **settings)
        trainer.fit(module)
        run.weights |= {name: value.detach().clone() for name, value in module.state_dict().items()}
        for each in callbacks:
            if isinstance(each, Average):
                run.weights |= {f"mean.{name}": value for name, value in each.mean.items()}
            if type(each) is cb.ModelCheckpoint:
                saved = torch.load(each.best_model_path, weights_only=False)["state_dict"]
                run.weights |= {f"saved.{name}": value for name, value in saved.items()}
        return run


def callback(cls: type[Any], remark: str = "", more: tuple[tuple[str, Any], ...] = (), **own: Any) -> Case:
    """A case of one callback."""
    return Case(cls.__name__, "defaults", lambda: [cls(**own)], remark, more)


EPOCHS = (("max_steps", -1), ("max_epochs", 4), ("limit_train_batches", 2))
SAVING = (("enable_checkpointing", True),)
LOGGING = (("logger", True),)
SHOWING = (("enable_progress_bar", True),)
CASES = [
    Case("Trainer", "strategy alone"),
    Case("Trainer", "training_step returns a Python number", net=(("number", True),)),
    Case("Trainer", "accumulate_grad_batches=2", settings=(("accumulate_grad_batches", 2),)),
    Case("Trainer", "validation in each step", settings=(("val_check_interval", 1),)),
    Case("Callback", "averages parameters", lambda: [Average()]),
    callback(cb.EMAWeightAveraging, decay=0.9),
    callback(cb.WeightAveraging),
    callback(cb.StochasticWeightAveraging, more=EPOCHS, swa_lrs=1e-2, swa_epoch_start=1, annealing_epochs=1),
    callback(cb.BackboneFinetuning, more=EPOCHS, unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 1.5),
    callback(cb.GradientAccumulationScheduler, more=EPOCHS, scheduling={0: 2, 2: 1}),
    callback(cb.ModelCheckpoint, more=SAVING, every_n_train_steps=1, save_last=True),
    callback(cb.OnExceptionCheckpoint, more=SAVING, dirpath=folder()),
    callback(cb.EarlyStopping, monitor="train_loss", patience=1),
    callback(cb.ModelPruning, more=EPOCHS, pruning_fn="l1_unstructured", amount=0.5),
    callback(
        cb.LearningRateFinder,
        'Its steps are noisy: `ZOConfig(lr="auto")` averages over trial runs.',
        num_training_steps=20,
        early_stop_threshold=None,
    ),
    callback(cb.BatchSizeFinder, max_trials=1, steps_per_trial=1),
    callback(cb.LearningRateMonitor, more=LOGGING),
    callback(cb.DeviceStatsMonitor, more=LOGGING),
    callback(cb.Timer),
    callback(cb.ThroughputMonitor, more=LOGGING, batch_size_fn=lambda batch: len(batch[0])),
    callback(cb.SpikeDetection),
    callback(cb.LambdaCallback, on_train_batch_end=lambda *args: None),
    callback(cb.ModelSummary),
    callback(cb.RichModelSummary),
    callback(cb.RichProgressBar, more=SHOWING),
    callback(cb.TQDMProgressBar, more=SHOWING),
]
