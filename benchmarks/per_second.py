"""What is learnt in equal processor time, at the default rate: how many directions, how many rows, in which way?

Each setting learns for the same processor seconds, with three seeds. Resident, stacked and streamed runs take the same
steps (stacked ones up to rounding), so that one run is learnt for all, and only the time of a step is measured in each
way: medians of steps that take turns.

    python -m benchmarks.per_second --save
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from .contenders import Contender, Trainer, activations
from .forwards_to_target import TASKS
from .report import save
from .tasks import CACHE, Batch, Maker, Task, held_out

CPU = torch.device("cpu")
STACKED: dict[str, Any] = {"stack_probes": True}
STREAMED: dict[str, Any] = {"offload": "cpu"}
WAYS: dict[str, dict[str, Any]] = {"resident": {}, "stacked": STACKED, "streamed": STREAMED}
#: What moves.
MOVES: dict[str, Contender] = {
    "adapter along the activations": Contender(activations()),
    "all weights": Contender(),
    "all weights, low rank": Contender(settings={"noise": "low_rank"}),
}
#: Part of the seconds after which the loss is measured again.
SHARE = 0.2


@dataclass(frozen=True)
class Setting:
    """What moves, the directions of a step, the rows of its batch, and the ways that are timed."""

    moves: str
    directions: int = 1
    rows: int = 16
    ways: tuple[str, ...] = ("resident",)

    def contender(self, way: str) -> Contender:
        of = MOVES[self.moves]
        return replace(of, settings={**of.settings, "num_probes": self.directions, **WAYS[way]})


SETTINGS = [
    *(Setting("adapter along the activations", n) for n in (1, 2, 4, 8)),
    *(Setting("adapter along the activations", n, rows=4) for n in (1, 4)),
    Setting("all weights", 1, ways=("resident", "streamed")),
    Setting("all weights", 8, ways=("resident", "streamed")),
    *(Setting("all weights, low rank", n, ways=("resident", "stacked")) for n in (1, 8)),
]


def with_rows(task: Task, rows: int) -> Task:
    """The task with batches of the first ``rows`` rows; held-out ones stay as they are."""

    def data(step: int) -> Batch:
        return task.data(step) if step < 0 else tuple(column[:rows] for column in task.data(step))

    return replace(task, model=copy.deepcopy(task.model), data=data)


def step_times(trainers: Sequence[Trainer], steps: int) -> list[float]:
    """Median processor seconds of a step of each, in turns; the first steps do not count."""
    times: list[list[float]] = [[] for _ in trainers]
    for step in range(steps + 2):
        for trainer, spent in zip(trainers, times, strict=True):
            batch = trainer.task.data(step)
            start = time.process_time()
            trainer.step(batch)
            spent.append(time.process_time() - start)
    return [statistics.median(spent[2:]) for spent in times]


def learn(setting: Setting, task: Task, seed: int, step_seconds: float, seconds: float) -> list[tuple[float, float]]:
    """Held-out losses of a resident run against processor seconds, counted as steps times ``step_seconds``."""
    trainer = Trainer(setting.contender("resident"), with_rows(task, setting.rows), 0, seed)
    curve, steps = [(0.0, held_out(task, trainer.model))], 0
    while curve[-1][0] < seconds:
        for _ in range(max(1, round(SHARE * seconds / step_seconds))):
            trainer.step(trainer.task.data(1_000_000 * seed + steps))
            steps += 1
        found = held_out(task, trainer.model)
        curve.append((steps * step_seconds, found if math.isfinite(found) else math.inf))
    return curve


def at(curve: Sequence[tuple[float, float]], seconds: float) -> float:
    """The loss after so many seconds, interpolated."""
    for (start, first), (stop, last) in pairwise(curve):
        if start <= seconds <= stop:
            return first + (last - first) * (seconds - start) / (stop - start)
    return curve[-1][1]


def rows_of(setting: Setting, name: str, task: Task, args: argparse.Namespace) -> list[list[str]]:
    """A row for each way."""
    trainers = [Trainer(setting.contender(way), with_rows(task, setting.rows), 0, 0) for way in setting.ways]
    times = step_times(trainers, max(4, 12 // setting.directions))
    longest = args.seconds * max(1.0, times[0] / min(times))
    curves = [learn(setting, task, seed, times[0], longest) for seed in range(args.seeds)]
    rows = []
    for way, spent in zip(setting.ways, times, strict=True):
        ends = sorted(at(curve, args.seconds * times[0] / spent) for curve in curves)
        loss = f"{statistics.median(ends):.3f} ({ends[0]:.3f} to {ends[-1]:.3f})"
        cost = [f"{1000 * spent:.0f}", f"{1000 * spent / 2 / setting.directions:.1f}"]
        rows.append([name, setting.moves, str(setting.directions), str(setting.rows), way, *cost, loss])
        print(rows[-1], flush=True)
    return rows


def learning(args: argparse.Namespace) -> None:
    rows = []
    for name in args.tasks:
        task = TASKS[name](Maker(args.cache))
        before = f"{held_out(task, task.model):.3f}"
        rows.append([name, "before", "", "", "", "", "", before])
        for setting in SETTINGS:
            rows += rows_of(setting, name, task, args)
    columns = ["task", "what moves", "directions", "rows", "way", "ms a step", "ms a forward"]
    title = f"Held-out loss after {args.seconds:g} processor seconds at the default rate, {args.seeds} seeds"
    save("per-second", title, [*columns, "loss"], rows, CPU, write=args.save)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=["verbalizer", "classify"], choices=TASKS)
    parser.add_argument("--seconds", type=float, default=3.0, help="processor seconds of a run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the trained models")
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    learning(args)


if __name__ == "__main__":
    main()
