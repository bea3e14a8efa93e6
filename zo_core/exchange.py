"""How the processes of a run share the measurements of a step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from .records import Point, Probe

#: For each process, the losses that it measured, by the index of the point.
Rows = Sequence[Mapping[int, float]]


class Exchange(Protocol):
    """Shares the points of a step between processes, and brings all of their losses to each of them.

    Attributes:
        rank: index of this process.
        size: number of processes.
        populations: how many equal parts of the directions were measured on data of their own each.
        same_data: whether the points of one batch are dealt out, so that all processes need the same batches.
    """

    rank: int
    size: int
    same_data: bool

    @property
    def populations(self) -> int: ...

    def directions(self, own: int) -> int:
        """How many directions a step has if ``num_probes`` is ``own``."""
        ...

    def dealt(self, points: Sequence[Point], seeds: Sequence[int]) -> list[tuple[int, ...]]:
        """For each process, the indices of the points that it measures, given the seeds of all directions."""
        ...

    def gather(self, points: Sequence[Point], seeds: Sequence[int], step: int, losses: Sequence[float]) -> Rows:
        """The losses of all processes, given those of this one's share; none at all if a query has failed.

        Raises:
            RanksError: another process could not measure its share, is at another step, or does not answer.
        """
        ...

    def combine(self, points: Sequence[Point], rows: Rows) -> list[float]:
        """One loss for each of the first points of the step, the same numbers on every process."""
        ...

    def average(self, values: Sequence[float]) -> list[float]:
        """The mean over the processes of each of a few numbers, the same on every process."""
        ...

    def mean(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The mean over the processes of each of some tensors, the same bits on every process.

        One that only some processes have counts as zero in the others.
        """
        ...

    def everywhere(self, own: Any) -> list[Any]:
        """What each process passes, a value that can be pickled, in the order of the ranks."""
        ...

    def fail(self, error: BaseException) -> None:
        """Tells the other processes that this one cannot measure the step; they raise `RanksError`."""
        ...

    def done(self, step: int, probes: Sequence[Probe], rates: Sequence[float]) -> None:
        """Takes note of what a step has applied, to be compared with the other processes at the next one.

        Args:
            step: its index.
            probes: what it has applied; empty if it was skipped.
            rates: the learning rates and weight decays of all groups.
        """
        ...


class Alone:
    """One process: it measures every point, and there is nothing to gather."""

    rank, size, same_data = 0, 1, False
    populations = 1

    def directions(self, own: int) -> int:
        return own

    def dealt(self, points: Sequence[Point], seeds: Sequence[int]) -> list[tuple[int, ...]]:
        return [tuple(range(len(points)))]

    def gather(self, points: Sequence[Point], seeds: Sequence[int], step: int, losses: Sequence[float]) -> Rows:
        return [dict(enumerate(losses))]

    def combine(self, points: Sequence[Point], rows: Rows) -> list[float]:
        return [rows[0][index] for index in range(len(points))]

    def average(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def mean(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        return list(tensors)

    def everywhere(self, own: Any) -> list[Any]:
        return [own]

    def fail(self, error: BaseException) -> None:
        """Nobody else is there."""

    def done(self, step: int, probes: Sequence[Probe], rates: Sequence[float]) -> None:
        """Nobody else is there."""


def shares(mode: str, points: Sequence[Point], seeds: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """For each process, the indices of the points that it measures.

    Args:
        mode: "directions", "data" or "points"; see the setting ``ranks``.
        points: those of the step.
        seeds: of all directions of the step.
        size: number of processes.
    """
    if mode == "data":
        return [tuple(range(len(points)))] * size
    if mode == "points":
        order = {seed: index for index, seed in enumerate(seeds)}
        whole = len(order) >= size  # both slopes of a direction are one forward, so they stay together
        turns = [order[point.seed] if point.linear and whole else index for index, point in enumerate(points)]
        return [tuple(index for index, turn in enumerate(turns) if turn % size == rank) for rank in range(size)]
    own = len(seeds) // size
    home = {seed: index // own for index, seed in enumerate(seeds[: own * size])}
    return [
        tuple(index for index, point in enumerate(points) if point.scale == 0.0 or home.get(point.seed) == rank)
        for rank in range(size)
    ]


def combined(mode: str, points: Sequence[Point], rows: Rows) -> list[float]:
    """One loss for each point, from those of all processes.

    With "directions", each process has data of its own, so the losses at perturbed weights are moved by the
    difference between its loss at the unperturbed weights and the mean of these, if any of the points is there.
    """
    if mode == "points":
        return [row[index] for index in range(len(points)) for row in rows if index in row]
    if mode == "data":
        return [math.fsum(row[index] for row in rows) / len(rows) for index in range(len(points))]
    centres = [index for index, point in enumerate(points) if point.scale == 0.0]
    means = {index: math.fsum(row[index] for row in rows) / len(rows) for index in centres}
    found = []
    for index in range(len(points)):
        if index in means:
            found.append(means[index])
            continue
        row = next(row for row in rows if index in row)
        found.append(row[index] + (means[centres[0]] - row[centres[0]]) if centres else row[index])
    return found
