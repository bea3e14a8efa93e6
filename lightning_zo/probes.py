"""The calls of ``training_step`` that measure one micro-batch: their losses, and what they logged."""

from __future__ import annotations

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

from zo_core.oracle import each_copy, upcast

#: Probes of a streamed model run in turns, each in a thread with context variables of its own.
_current: ContextVar[Run] = ContextVar("zo_probe")


@dataclass
class Run:
    """One call of ``training_step``, for one probe or for all of them at once.

    Attributes:
        output: what it returned, to the first of its probes.
        loss: the loss in that, the mean over its probes; None if there was none.
        logged: value and keyword arguments of each `log` call, by name and how often the name came before.
    """

    output: Any = None
    loss: Any = None
    logged: dict[tuple[str, int], tuple[Any, tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    names: Counter[str] = field(default_factory=Counter)

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Keeps what the module logs; a tensor may show a perturbed weight, so it is copied."""
        value = _mean([one.clone() for one in each_copy(value.detach())]) if isinstance(value, Tensor) else value
        self.logged[name, self.names[name]] = (value, args, kwargs)
        self.names[name] += 1


class Probes:
    """Runs ``training_step`` once per probe; from outside it looks like one step with the mean of all.

    Args:
        module: its `log` is replaced while probes run.
        count: how many probes there are.
        accumulated: number of micro-batches in a step; losses are divided by it, as Lightning does.
        in_turns: whether the probes run by turns, those of a streamed model.
    """

    def __init__(self, module: LightningModule, count: int, accumulated: int, in_turns: bool):
        self.module, self.count, self.accumulated, self.in_turns = module, count, accumulated, in_turns
        self.runs: list[Run] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """A context in which the module's logs are kept, and none reaches the trainer.

        The profiler is paused if probes run in turns: a part of the step would begin twice before it ends.
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
        """One probe, on containers of its own: modules pop entries from their batch.

        Returns:
            The loss for the engine; 0.0 where there was none, which changes no difference of losses.
        """
        run = Run()
        self.runs.append(run)  # now, in the order of the probes: by turns, they may end in another
        token = _current.set(run)
        try:
            args, kwargs = apply_to_collection((args, kwargs), Tensor, lambda tensor: tensor)
            output = step(*args, **kwargs)
        except Exception:  # the engine repeats what does not work for several probes at once
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
        """Drops the runs that the engine repeated: of a first step whose loss came out as NaN, or that compares."""
        for run in list(self.runs):
            if len(self.runs) > self.count and run.loss is not None and not torch.isfinite(_number(run.loss)):
                self.runs.remove(run)
        del self.runs[: -self.count]

    @property
    def without_loss(self) -> int:
        """How many probes returned None."""
        return sum(run.loss is None for run in self.runs)

    @property
    def names(self) -> set[str]:
        """What the module logged."""
        return {name for run in self.runs for name, _ in run.logged}

    def log(self) -> None:
        """Logs each name once, with the mean over the probes that logged it; metric objects as they are."""
        keys = list(dict.fromkeys(key for run in self.runs for key in run.logged))
        for key in keys:
            calls = [run.logged[key] for run in self.runs if key in run.logged]
            _, args, kwargs = calls[0]
            self.module.log(key[0], _mean([value for value, _, _ in calls]), *args, **kwargs)

    def output(self) -> Any:
        """What one ``training_step`` would have returned: the mean loss, all else from the first probe."""
        if self.without_loss:
            return None
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
