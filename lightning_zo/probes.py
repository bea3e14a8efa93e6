"""The calls of ``training_step`` that measure one micro-batch: their losses and logged values."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from numbers import Number
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.profilers import PassThroughProfiler
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from zo_core.probing import each_copy, measured_again, upcast

#: The run of the current probe. Those of a streamed model take turns, each in a thread with its own context variables.
_current: ContextVar[Run] = ContextVar("zo_probe")


@dataclass
class Run:
    """One call of ``training_step``, for one probe or for all of them at once.

    Attributes:
        output: its return value for the first of its probes.
        loss: the loss in the return value, as the mean over its probes; None if there was none.
        logged: value and arguments of each `log` call, by name and the number of earlier calls with that name.
        names: number of `log` calls by name.
    """

    output: Any = None
    loss: Any = None
    logged: dict[tuple[str, int], tuple[Any, tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    names: Counter[str] = field(default_factory=Counter)

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Keeps a logged value; a tensor is copied, because it may be a view of a perturbed weight."""
        value = _mean([one.clone() for one in each_copy(value.detach())]) if isinstance(value, Tensor) else value
        self.logged[name, self.names[name]] = (value, args, kwargs)
        self.names[name] += 1


class Probes:
    """Runs ``training_step`` once per probe; to the trainer this is one call, with the mean over the probes.

    Args:
        module: the module, whose `log` is replaced while probes run.
        count: number of probes.
        accumulated: number of micro-batches in a step; losses are divided by it, as Lightning does.
        in_turns: whether the probes take turns, as those of a streamed model do.
    """

    def __init__(self, module: LightningModule, count: int, accumulated: int, in_turns: bool):
        self.module, self.count, self.accumulated, self.in_turns = module, count, accumulated, in_turns
        self.runs: list[Run] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """A context in which the module's logs are kept and do not reach the trainer.

        The profiler is paused if probes take turns, because a part of the step would start twice before it ends.
        """
        own = vars(self.module).get("log")
        trainer: Any = self.module.trainer
        profiler = trainer.profiler
        trainer.profiler = PassThroughProfiler() if self.in_turns else profiler
        self.module.log = lambda *args, **kwargs: _current.get().log(*args, **kwargs)  # type: ignore[method-assign]
        try:
            yield
        finally:
            del self.module.log
            trainer.profiler = profiler
            if own is not None:
                self.module.log = own  # type: ignore[method-assign]

    def run(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs one probe, on copies of the containers, because modules pop entries from their batch.

        Returns:
            The loss for the engine; 0.0 if there was none, which changes no difference of losses.
        """
        run = Run()
        if measured_again():
            del self.runs[-1:]
        self.runs.append(run)  # here, in the order of the probes: if they take turns, they may end in another order
        token = _current.set(run)
        try:
            args, kwargs = apply_to_collection((args, kwargs), Tensor, lambda tensor: tensor)
            output = step(*args, **kwargs)
        except Exception:  # the engine runs the probes one by one if this does not work for several at once
            self.runs = [other for other in self.runs if other is not run]
            raise
        finally:
            _current.reset(token)
        run.output = apply_to_collection(output, Tensor, lambda tensor: each_copy(tensor)[0])
        loss = output.get("loss") if isinstance(output, Mapping) else output
        run.loss = None if loss is None else _mean(each_copy(loss))
        if loss is None and not isinstance(output, Mapping):
            return 0.0
        if self.accumulated == 1 or not isinstance(loss, (Tensor, Number)):
            return loss
        return upcast(loss) / self.accumulated

    def finish(self) -> None:
        """Drops the runs that the engine repeated in a first step, after a NaN loss or to compare two measurements."""
        for run in list(self.runs):
            if len(self.runs) > self.count and run.loss is not None and not torch.isfinite(_number(run.loss)):
                self.runs.remove(run)
        del self.runs[: -self.count]

    @property
    def without_loss(self) -> int:
        """Number of probes that returned None."""
        return sum(run.loss is None for run in self.runs)

    @property
    def names(self) -> set[str]:
        """Names that the module logged."""
        return {name for run in self.runs for name, _ in run.logged}

    def log(self) -> None:
        """Logs each name once, with the mean over the probes that logged it; metric objects are passed on unchanged."""
        keys = list(dict.fromkeys(key for run in self.runs for key in run.logged))
        for key in keys:
            calls = [run.logged[key] for run in self.runs if key in run.logged]
            _, args, kwargs = calls[0]
            self.module.log(key[0], _mean([value for value, _, _ in calls]), *args, **kwargs)

    def output(self) -> Any:
        """Returns what one ``training_step`` would return.

        Returns:
            The mean loss, float32 of shape ``[]``, and everything else from the first probe. None if a probe had
            no loss.
        """
        if self.without_loss:
            return None
        if not self.runs:  # a query failed in the first of them
            return torch.tensor(math.nan)
        loss = torch.stack([_number(run.loss) for run in self.runs]).mean()
        first = self.runs[0].output
        return {**first, "loss": loss} if isinstance(first, Mapping) else loss


def _number(value: Any) -> Tensor:
    return torch.as_tensor(value).detach().to(torch.float32).reshape(())


def _mean(values: list[Any]) -> Any:
    if not all(isinstance(value, (Tensor, Number)) for value in values):
        return values[-1]
    tensors = [upcast(torch.as_tensor(value)) for value in values]
    return torch.stack([t if t.is_floating_point() else t.to(torch.float32) for t in tensors]).mean(0)
