"""Runs of ZOTrainer for `torchrun`: this file is the script of each process, and writes what it ends with."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from hf_zo import ZOTrainer, ZOTrainingArguments, activation_adapter
from zo_core import RanksError

STEPS = 6
BACKPROP: dict[str, Any] = {
    "zo_backprop": ["lm_head", "model.layers.1"],
    "zo_backprop_lr": 1e-2,
    "max_grad_norm": 0.5,
    "adam_beta2": 0.9,
}


class Ordered(ZOTrainer):
    """Takes its rows in order, so that two processes see what one sees that accumulates."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class Interrupted(Exception):
    """An error of the user's own code."""


class CtrlC(TrainerCallback):
    """An interrupt after a step, in all processes."""

    def __init__(self) -> None:
        self.left = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.left and state.global_step == 2:
            self.left = False
            raise KeyboardInterrupt


class Interrupt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == STEPS - 1:
            raise Interrupted


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    lengths = [4 + index % 5 for index in range(48)]
    ids = [torch.randint(0, 64, (length,), generator=generator) for length in lengths]
    padded = [torch.nn.functional.pad(each, (0, 8 - len(each))) for each in ids]
    labels = [torch.nn.functional.pad(each, (0, 8 - len(each)), value=-100) for each in ids]
    return [{"input_ids": i, "labels": t} for i, t in zip(padded, labels, strict=True)]


def adapted(rank: int = 0) -> Any:
    """The model with an adapter along the activations of rows that are others in each process."""
    seen = rows()[4 * rank :][:4]
    return activation_adapter(model(), {"input_ids": torch.stack([row["input_ids"] for row in seen])}, rank=2)


def trainer(
    folder: Path,
    mode: str = "directions",
    accumulate: int = 1,
    callbacks: Any = (),
    cls: Any = None,
    make: Callable[[], Any] = model,
    **settings: Any,
) -> Ordered:
    args = ZOTrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulate,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=3,
        zo_ranks=mode,
        **{"learning_rate": 1e-3, "lr_scheduler_type": "constant", "save_steps": 3, "max_steps": STEPS, **settings},
    )
    return (cls or Ordered)(make(), args, train_dataset=rows(), eval_dataset=rows()[:16], callbacks=list(callbacks))


def train(folder: Path, *args: Any, resume: bool = False, **kwargs: Any) -> dict[str, Any]:
    run = trainer(folder, *args, **kwargs)
    run.train(resume_from_checkpoint=resume)
    assert run.model is not None
    wrapped = type(run.model_wrapped).__name__
    return {"state": run.model.state_dict(), "log": run.state.log_history, "wrapped": wrapped}


class Measuring(Ordered):
    """Is interrupted on rank 1 while it measures a step."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 4 and self.args.process_index == 1 and not self.interrupted:
            type(self).interrupted = True  # not an attribute of the trainer: these go back with the step
            raise KeyboardInterrupt
        return super().compute_loss(*args, **kwargs)

    interrupted = False


def continued(folder: Path) -> dict[str, Any]:
    """A run that goes on in the same processes after two interrupts."""
    run = trainer(folder, callbacks=[CtrlC()], cls=Measuring, save_steps=5, zo_rule="momentum")
    assert run.model is not None
    for resume, kinds in ((False, KeyboardInterrupt), (True, (KeyboardInterrupt, RanksError))):
        with suppress(kinds):  # type: ignore[arg-type]
            run.train(resume_from_checkpoint=resume)
    run.train(resume_from_checkpoint=True)
    return {"state": run.model.state_dict(), "stopped": run.interrupted}


def main(folder: Path) -> None:
    found = {
        "directions": train(folder / "directions"),
        "data": train(folder / "data", "data"),
        "points": train(folder / "points", "points"),
        "accumulated": train(folder / "accumulated", "directions", 2),
        "normalised": train(folder / "normalised", learning_rate=None, zo_num_probes=2),
        "streamed": train(folder / "streamed", zo_offload="cpu"),
        "adapter": train(folder / "adapter", "data", make=partial(adapted, int(os.environ["RANK"]))),
        "backprop": train(folder / "backprop", "data", **BACKPROP),
        "whole backprop": train(folder / "whole backprop", **BACKPROP),
        "streamed adapter": train(folder / "streamed adapter", "data", make=adapted, zo_offload="cpu"),
    }
    with suppress(Interrupted):
        train(folder / "resumed", callbacks=[Interrupt()])
    with suppress(Interrupted):
        train(folder / "resumed backprop", callbacks=[Interrupt()], **BACKPROP)
    found["resumed backprop"] = train(folder / "resumed backprop", resume=True, **BACKPROP)
    found["resumed"] = train(folder / "resumed", resume=True)
    found["momentum"] = train(folder / "momentum", zo_rule="momentum")
    found["continued"] = continued(folder / "continued")
    torch.save(found, folder / f"rank{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
