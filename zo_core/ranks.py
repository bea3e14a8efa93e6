"""Several processes that train one model: they exchange losses, 8 bytes a point, and no weights.

Gradients travel only under ``backprop``, those of the weights that it names.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import blake2b
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import ConfigError, RanksError
from .exchange import Alone, Exchange, Rows, combined, shares
from .records import Point, Probe
from .whole import Whole

logger = logging.getLogger(__name__)

#: Rank 0 says what there is to say; the others only say errors.
LOGGERS = ("zo_core", "hf_zo", "lightning_zo")
#: What is exchanged next, as every process says before it: a failure, losses of a step, numbers or tensors to average.
FAILURE, LOSSES, NUMBERS, TENSORS = range(4)
#: Shape and dtype of a tensor; None if there is none.
Kind = tuple[torch.Size, torch.dtype] | None
#: Seconds that the survivors give each other to answer after an exchange has failed.
ROLL_CALL = 5


def world_size() -> int:
    """Number of processes of the default group; 1 if there is none, or if torch was built without them."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def exchange_of(mode: str | None, group: Sequence[int] = ()) -> Exchange:
    """The exchange between the processes of the default process group, or that of a process alone.

    Args:
        mode: the setting ``ranks``; None for processes that train models of their own.
        group: see `Ranks`.
    """
    return Alone() if mode is None or world_size() == 1 else Ranks(mode, group)


class Ranks:
    """All processes of the default process group (``torchrun``, ``accelerate launch``, Lightning's ``devices=2``).

    Losses are gathered in float64 and in the order of the ranks, and every process computes the same estimate of
    them; nothing is reduced by a collective, whose order of summation depends on the topology. They travel over
    gloo, also where the model is on GPUs. An exchange is more than one collective, so a thread makes it: an interrupt
    of this process cannot end it between two of them, after which the others would read one thing for another.

    Args:
        mode: "directions", "data" or "points".
        group: ranks of the processes that hold the parts of one model with this one, which count as one process;
            empty if this process holds all of it.

    Attributes:
        units: how many processes there are, if those with parts of one model are counted as one.
        unit: for each rank, which of these it belongs to.
    """

    def __init__(self, mode: str, group: Sequence[int] = ()):
        self.mode, self.rank, self.size = mode, dist.get_rank(), dist.get_world_size()
        self.same_data = mode == "points"
        #: The default group, with the user's timeout, if it takes tensors in host memory.
        self.group: Any = None if "gloo" in str(dist.get_backend_config()) else dist.new_group(backend="gloo")
        self._step, self._digest = 0, 0
        self._told: BaseException | None = None
        self._whole = Whole()
        groups = [tuple(each) for each in self._whole.run(lambda: self._objects(list(group)))] if group else []
        order = {each: unit for unit, each in enumerate(dict.fromkeys(groups))}
        self.unit = [order[each] for each in groups] if groups else list(range(self.size))
        self.units = max(self.unit) + 1
        if self.rank:
            for name in LOGGERS:
                if logging.getLogger(name).level == logging.NOTSET:
                    logging.getLogger(name).setLevel(logging.ERROR)

    @property
    def populations(self) -> int:
        return self.units if self.mode == "directions" else 1

    def directions(self, own: int) -> int:
        return own * self.units if self.mode == "directions" else own

    def dealt(self, points: Sequence[Point], seeds: Sequence[int]) -> list[tuple[int, ...]]:
        found = shares(self.mode, points, seeds, self.units)
        if not all(found):
            raise ConfigError(
                [
                    f"ranks='points' deals {len(points)} points a step to {self.units} processes, so some have none; "
                    "raise num_probes, or write ranks='directions'"
                ]
            )
        return [found[unit] for unit in self.unit]

    def gather(self, points: Sequence[Point], seeds: Sequence[int], step: int, losses: Sequence[float]) -> Rows:
        found = shares(self.mode, points, seeds, self.units)
        own = torch.full((max(map(len, found)) + 1,), float("nan"), dtype=torch.float64)
        own[: len(losses)] = torch.tensor(losses, dtype=torch.float64)
        own[-1] = len(losses)
        rows = self._of_units(self._whole.run(lambda: self._numbers(LOSSES, step, own)))
        return [dict(zip(indices[: int(row[-1])], row, strict=False)) for indices, row in zip(found, rows, strict=True)]

    def combine(self, points: Sequence[Point], rows: Rows) -> list[float]:
        return combined(self.mode, points, rows)

    def average(self, values: Sequence[float]) -> list[float]:
        own = torch.tensor(values, dtype=torch.float64)
        rows = self._of_units(self._whole.run(lambda: self._numbers(NUMBERS, len(values), own)))
        return [math.fsum(column) / self.units for column in zip(*rows, strict=True)]

    def mean(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        # Copied by this thread, whose streams have computed them, and before the exchange begins: an error is then one
        # that all processes hear of.
        own = [None if each is None else each.to("cpu", _summed_in(each.dtype)).contiguous() for each in tensors]
        kinds = [None if each is None else (each.shape, each.dtype) for each in tensors]
        return self._whole.run(lambda: self._mean(own, kinds))

    def _of_units(self, rows: Sequence[Sequence[float]]) -> list[Sequence[float]]:
        """One row for each unit, whose processes have computed the same numbers.

        Raises:
            RanksError: they have not; on every process.
        """
        firsts = [self.unit.index(unit) for unit in range(self.units)]
        for rank, row in enumerate(rows):
            first = firsts[self.unit[rank]]
            if repr(row) != repr(rows[first]):  # which is exact, and the same for all NaN
                raise RanksError(
                    f"rank {rank} and rank {first} hold parts of one model, and have measured {_shown(row)} and "
                    f"{_shown(rows[first])} at the same points; give both the same batches, and return the same loss "
                    "from both (that of gathered outputs, not of a part of them)"
                )
        return [rows[first] for first in firsts]

    def fail(self, error: BaseException) -> None:
        if isinstance(error, RanksError) or error is self._told:
            return
        self._told = error
        try:
            self._whole.run(lambda: self._failure(f"{type(error).__name__}: {error}"))
        except RanksError as lost:
            logger.warning("the other processes could not be told of this error: %s", lost)

    def done(self, step: int, probes: Sequence[Probe], rates: Sequence[float]) -> None:
        # Six digits: cosines of schedules may differ in their last bits between machines. Skipped steps use no rate.
        applied = [(probe.seed, probe.coefficient) for probe in probes], [f"{rate:g}" for rate in rates if probes]
        found = blake2b(repr(applied).encode(), digest_size=8).digest()
        self._digest = int.from_bytes(found, "little", signed=True)
        self._step = step + 1

    def everywhere(self, own: Any) -> list[Any]:
        return self._whole.run(lambda: self._values(own))

    def send(self, tensor: Tensor) -> None:
        """Gives a tensor the values that it has on rank 0."""
        values = tensor.reshape(-1).cpu().contiguous()
        self._whole.run(lambda: self._try(lambda: dist.broadcast(values.view(torch.uint8), src=0, group=self.group)))
        tensor.copy_(values.view_as(tensor))

    # What travels, each as a whole

    def _numbers(self, kind: int, number: int, own: Tensor) -> list[list[float]]:
        self._enter(kind, number)
        return [row.tolist() for row in self._gathered(own)]

    def _mean(self, tensors: Sequence[Tensor | None], kinds: Sequence[Kind]) -> list[Tensor | None]:
        self._enter(TENSORS, len(tensors))
        found: list[Tensor | None] = []
        for own, *theirs in zip(tensors, *self._objects(kinds), strict=True):
            kind = next((each for each in theirs if each is not None), None)
            found.append(own if kind is None else self._mean_of(own, *kind))
        return found

    def _mean_of(self, own: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """One tensor of the mean, or with "points", where all have computed the same one, that of rank 0."""
        mine = torch.zeros(shape, dtype=_summed_in(dtype), device="cpu") if own is None else own
        sum_, turns = torch.zeros_like(mine), range(1 if self.same_data else self.size)
        for rank in turns:  # one after another, in an order that no topology changes
            theirs = mine.clone() if rank == self.rank else torch.empty_like(mine)
            self._try(partial(dist.broadcast, theirs, src=rank, group=self.group))
            sum_ += theirs
        return (sum_ / len(turns)).to(dtype)

    def _values(self, own: Any) -> list[Any]:
        self._enter(NUMBERS, 0)
        return self._objects(own)

    def _failure(self, text: str) -> None:
        self._headers(FAILURE, 0)
        self._objects(text)

    # Its parts

    def _enter(self, kind: int, number: int) -> None:
        """Finds out whether all processes exchange the same thing next.

        Raises:
            RanksError: they do not; on every process.
        """
        headers = self._headers(kind, number)
        if any(header[0] == FAILURE for header in headers):
            texts = self._objects("")
            failed = ", and ".join(f"rank {rank} raised {text}" for rank, text in enumerate(texts) if text)
            raise RanksError(f"this step was given up, and the weights are as they were before it: {failed}")
        for rank, header in enumerate(headers):
            if header[:2] != headers[0][:2]:
                raise RanksError(
                    f"rank {rank} is at {_said(header)}, and rank 0 at {_said(headers[0])}: all processes have to make "
                    "the same calls, and to continue from the same checkpoint"
                )
            if header[2] != headers[0][2]:
                raise RanksError(
                    f"rank {rank} and rank 0 applied different updates in the step before this one, so their weights "
                    "differ; continue from the last checkpoint, and set the same learning rates and weight decay in "
                    "all processes (a scheduler that follows a loss needs the same loss in all of them)"
                )

    def _headers(self, kind: int, number: int) -> list[list[int]]:
        return [row.tolist() for row in self._gathered(torch.tensor([kind, number, self._digest]))]

    def _gathered(self, own: Tensor) -> list[Tensor]:
        rows = [torch.empty_like(own) for _ in range(self.size)]
        self._try(lambda: dist.all_gather(rows, own, group=self.group))
        return rows

    def _objects(self, own: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        self._try(lambda: dist.all_gather_object(found, own, group=self.group))
        return found

    def _try(self, exchange: Callable[[], object]) -> None:
        try:
            exchange()
        except RuntimeError as error:
            raise RanksError(
                f"{self._missing()} at step {self._step} ({str(error).splitlines()[0]}); the weights are as they were "
                "before the step. If it had no batch left: a loop over zo.batches(loader) ends in all processes at once"
            ) from error

    def _missing(self) -> str:
        """Which processes do not answer any more, as far as the store of the process group can tell."""
        try:
            store = dist.distributed_c10d._get_default_store()
            store.set(f"zo/{self._step}/{self.rank}", "here")
            time.sleep(ROLL_CALL)
            gone = [rank for rank in range(self.size) if not store.check([f"zo/{self._step}/{rank}"])]
        except (RuntimeError, ValueError):
            return "another process, perhaps rank 0, has ended or does not answer"
        names = ", ".join(f"rank {rank}" for rank in gone)
        return f"{names} has ended or does not answer" if gone else "the processes lost their connection"


def _shown(row: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:.9g}" for value in row) + ")"


def _said(header: Sequence[int]) -> str:
    return f"step {header[1]}" if header[0] == LOSSES else "an exchange between steps"


def _summed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which tensors of several processes are added."""
    return torch.float64 if dtype == torch.float64 else torch.float32
