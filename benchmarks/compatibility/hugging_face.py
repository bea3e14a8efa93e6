"""How a case of a Hugging Face trainer runs: with the mixin, and written out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from hf_zo import ZOTrainerMixin
from zo_core import NOISES, ZOConfig

from .written_out import EPS, SEED, Run, WrittenOut, keys_of, roots_of, same_start

#: Makes a trainer: gets what is put in front of its class, and further arguments of its constructor.
Make = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One trainer with one setting.

    Attributes:
        trainer: its name in the table.
        setting: what differs from its defaults.
        make: builds the trainer.
        remark: what its users should know.
        also: further tensors to compare at the end of a run, by name.
    """

    trainer: str
    setting: str
    make: Make
    remark: str = ""
    also: Callable[[Any], dict[str, Tensor]] | None = None

    def mine(self, **settings: Any) -> Run:
        """The run of this package."""
        run = Run()
        same_start()
        config = ZOConfig(eps=EPS, seed=SEED, **settings)
        trainer = self.make(lambda cls: type(f"ZO{cls.__name__}", (ZOTrainerMixin, cls), {}), zo_config=config)
        trainer.add_callback(_Records(trainer, run))
        return self._finished(trainer, run)

    def written_out(self, noise: str, keys: list[dict[str, str]]) -> Run:
        """The run that it should be equal to."""
        run = Run()
        same_start()
        attributes = {"noise": NOISES.resolve(noise), "keys": keys, "run": run}
        trainer = self.make(lambda cls: type(f"WrittenOut{cls.__name__}", (WrittenOut, cls), attributes))
        return self._finished(trainer, run)

    def _finished(self, trainer: Any, run: Run) -> Run:
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        for index, root in enumerate(roots_of(trainer)):
            run.weights |= {f"{index}.{name}": value.detach().clone() for name, value in root.state_dict().items()}
        if self.also is not None:
            run.weights |= {f"also.{name}": value.detach().clone() for name, value in self.also(trainer).items()}
        return run


class _Records(TrainerCallback):
    """Keeps the results of the steps of a run."""

    def __init__(self, trainer: Any, run: Run):
        self.trainer, self.run = trainer, run

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.zo.listeners.append(self._record)

    def _record(self, record: Any) -> None:
        self.run.keys.append(keys_of(self.trainer.zo, roots_of(self.trainer)))
        self.run.grads.append(record.projected_grad)
        self.run.losses.append(record.loss)
