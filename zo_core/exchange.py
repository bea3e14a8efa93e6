"""How the processes of a run share the measurements of a step."""

from __future__ import annotations

from typing import Protocol

from .records import Point


class Exchange(Protocol):
    """Shares the points of a step between processes, and gathers their losses in one order everywhere."""

    def share(self, points: tuple[Point, ...]) -> tuple[int, ...]:
        """Indices of the points that this process measures."""
        ...

    def gather(self, losses: list[float]) -> list[float]:
        """The losses of all points, given those of this process's share, in the order of the points."""
        ...


class Alone:
    """One process: it measures every point, and there is nothing to gather."""

    def share(self, points: tuple[Point, ...]) -> tuple[int, ...]:
        return tuple(range(len(points)))

    def gather(self, losses: list[float]) -> list[float]:
        return losses
