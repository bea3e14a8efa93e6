"""Does a first run learn? The loss with no rate given and with `lr="auto"`, beside the best rate of a search.

The tasks are those of `task_list.py`. Each cell is one run from the task's trained model: task, seed (of the directions
and of the order of the data) and contender. Cells are saved as they finish, and no cell is run twice.

    python -m benchmarks.first_run --workers 2 --save first-run
    python -m benchmarks.first_run --save first-run --table

With `--powers` the grid is fixed, so that all of its cells can run at the same time; `--seconds` ends the work early:

    python -m benchmarks.first_run --steps 300 --workers 14 --powers -7 4 --seconds 240
    python -m benchmarks.first_run --steps 300 --workers 2 --powers -7 4 --seconds 240 --device cuda --tasks bert-large
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from zo_core import ConfigError, ZeroOrder, ZOConfig

from .report import markdown, save, saved
from .task_list import LARGE, TASKS, lacking, make_task
from .tasks import CACHE, Task, held_out

CONTENDERS = ("default", "constant-default", "auto", "auto-one-batch", "grid")
COLUMNS = ["task", "seed", "steps", "schedule", "settings", "contender", "rate", "before", "after", "seconds"]
RATES = 12


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        task: its name.
        seed: of the directions and of the order of the data.
        steps: their number.
        schedule: of the rate: "constant", or "linear" decay to 0.
        settings: fields of `ZOConfig`, as JSON.
        contender: "default" gives no rate, "auto" searches it on 8 batches, as the trainers do, and "auto-one-batch"
            on the first, as a bare loop does; a number is a rate of the grid, with the normaliser of the default.
    """

    task: str
    seed: int
    steps: int
    schedule: str
    settings: str
    contender: str

    @property
    def key(self) -> tuple[str, ...]:
        return (self.task, str(self.seed), str(self.steps), self.schedule, self.settings, self.contender)


@dataclass(frozen=True)
class Outcome:
    """What a run gave: the rate of its first step, and the held-out loss before and after (infinite if it diverged)."""

    rate: float
    before: float
    after: float
    seconds: float = 0.0


# A run


@lru_cache
def _task(name: str, folder: Path, device: torch.device, dtype: torch.dtype) -> Task:
    return make_task(name, folder, device, dtype)


def prepare(name: str, folder: Path, device: torch.device, dtype: torch.dtype) -> float:
    """Trains the model of a task, unless it is in the folder; returns the seconds that it took."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    _task(name, folder, device, dtype)
    return time.perf_counter() - start


def run(cell: Cell, folder: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> Outcome:
    """Trains a copy of the task's model."""
    torch.set_num_threads(1)
    task = _task(cell.task, folder, device, dtype)
    model = copy.deepcopy(task.model)
    before = held_out(task, model)
    start = time.perf_counter()
    rate, finished = train(cell, task, model, before)
    seconds = time.perf_counter() - start
    after = held_out(task, model) if finished else math.inf
    return Outcome(rate, before, after if math.isfinite(after) else math.inf, seconds)


def engine(cell: Cell, model: torch.nn.Module) -> ZeroOrder:
    brake = "rollback" if cell.contender in CONTENDERS else None  # as the trainers have it
    config = ZOConfig(**{"seed": cell.seed, "brake": brake, **json.loads(cell.settings)})
    if cell.contender == "default":
        return ZeroOrder(model, config)
    if cell.contender in CONTENDERS:
        return ZeroOrder(model, config, lr="auto")
    return ZeroOrder(model, config, lr=float(cell.contender), normalise=config.resolve().normaliser or False)


def train(cell: Cell, task: Task, model: torch.nn.Module, before: float) -> tuple[float, bool]:
    """Runs the steps.

    Returns:
        The rate of the first step (NaN if ``lr="auto"`` found none, which leaves the weights alone), and whether the
        run came to its end. One of the grid is given up when its loss has grown fourfold; others are not.
    """
    zo = engine(cell, model)
    order = 1_000_000 * cell.seed
    rates: list[float] = []
    try:
        if cell.contender == "auto":
            batches = [task.data(500_000_000 + order + index) for index in range(8)]
            closures = [lambda pair=pair: task.loss(model, pair) for pair in batches]
            zo.find_lr(lambda: nullcontext(closures), steps=cell.steps)
        for step in range(cell.steps):
            if rates and cell.schedule == "linear":
                for group, rate in zip(zo.optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * (1 - step / cell.steps)
            pair = task.data(order + step)
            if cell.contender in CONTENDERS:
                zo.look_back(lambda: cell.steps)
            loss = float(zo.step(partial(task.loss, model, pair)))
            rates = rates or [group["lr"] for group in zo.optimizer.param_groups]
            if cell.contender not in CONTENDERS and not loss < 4.0 * before + 2.0:
                return rates[0], False
    except ConfigError:
        return math.nan, True
    return rates[0], True


# Which runs


def runs_of(cell: Cell, contenders: Iterable[str]) -> Generator[Cell, Outcome, None]:
    """The cells of a task and seed, one after another; each is answered with its outcome."""
    near = 1e-3
    for contender in contenders:
        if contender != "grid":
            outcome = yield named(cell, contender)
            near = outcome.rate if math.isfinite(outcome.rate) and outcome.rate > 0 else near
    if "grid" in contenders:
        yield from grid(cell, near)


def named(cell: Cell, contender: str) -> Cell:
    """The cell of a contender that is not the grid."""
    if contender == "constant-default":
        return replace(cell, contender="default", schedule="constant")
    return replace(cell, contender=contender)


def independent(
    cells: list[Cell], contenders: list[str], powers: tuple[int, int]
) -> list[Generator[Cell, Outcome, None]]:
    """Every cell by itself: first those without a rate, then the grid of each seed, the powers of 2 in these bounds."""
    first = [named(cell, contender) for cell in cells for contender in contenders if contender != "grid"]
    rates = range(powers[0], powers[1] + 1) if "grid" in contenders else ()
    return [
        _alone(cell) for cell in [*first, *(replace(cell, contender=f"{2.0**p:.6g}") for cell in cells for p in rates)]
    ]


def _alone(cell: Cell) -> Generator[Cell, Outcome, None]:
    yield cell


def grid(cell: Cell, near: float) -> Generator[Cell, Outcome, None]:
    """At most `RATES` powers of 2 around ``near``, see `best_power`."""

    def measured(power: int) -> Generator[Cell, Outcome, float]:
        outcome = yield replace(cell, contender=f"{2.0**power:.6g}")
        return outcome.after

    yield from best_power(2 * round(math.log2(near) / 2), RATES, measured)


def best_power(
    start: int, most: int, measured: Callable[[int], Generator[Any, Any, float]]
) -> Generator[Any, Any, int]:
    """The power of 2 with the lowest loss: a factor of 4 apart from ``start`` on, until both sides are worse, then 2.

    Args:
        start: the first power.
        most: how many are measured.
        measured: the loss at a power, as a part of the generator.
    """
    losses: dict[int, float] = {}

    def best() -> int:
        return min(losses, key=lambda power: (losses[power], power))

    losses[start] = yield from measured(start)
    for width in (2, 1):
        centre = None
        while centre != best():
            centre = best()
            for power in (centre - width, centre + width):
                if power not in losses and len(losses) < most:
                    losses[power] = yield from measured(power)
    return best()


def drive(
    plans: Iterable[Generator[Cell, Outcome, None]],
    known: dict[tuple[str, ...], Outcome],
    work: Callable[[Cell], Outcome],
    pool: Executor,
    workers: int,
    finished: Callable[[Cell], object],
    end: float = math.inf,
) -> None:
    """Runs the cells that are not known yet, ``workers`` at a time; each plan has one run at a time.

    Args:
        plans: they yield cells, and are sent the outcomes.
        known: the outcomes so far, which new ones are added to.
        work: runs a cell.
        pool: runs ``work``.
        workers: how many cells at a time.
        finished: called with every cell whose outcome is new.
        end: the time (`time.monotonic`) after which no cell is started.
    """
    fresh = iter(plans)
    active: dict[Future[Outcome], tuple[Generator[Cell, Outcome, None], Cell]] = {}

    def advance(plan: Generator[Cell, Outcome, None] | None, outcome: Outcome | None) -> None:
        """Submits the next unknown cell of the plan or, after its end, of the next one."""
        while plan := plan or next(fresh, None):
            try:
                cell = next(plan) if outcome is None else plan.send(outcome)
            except StopIteration:
                plan = outcome = None
                continue
            outcome = known.get(cell.key)
            if outcome is None:
                if time.monotonic() < end:
                    active[pool.submit(work, cell)] = (plan, cell)
                return

    for _ in range(workers):
        advance(None, None)
    while active:
        for future in wait(active, return_when=FIRST_COMPLETED).done:
            plan, cell = active.pop(future)
            known[cell.key] = future.result()
            finished(cell)
            advance(plan, known[cell.key])


def executor(workers: int) -> Executor:
    """Processes, or the current one for a single worker."""
    if workers == 1:
        return ThreadPoolExecutor(1)
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


# Results


def rows_of(known: dict[tuple[str, ...], Outcome]) -> list[list[str]]:
    """All digits are kept: the search for a rate has to go the same way when it goes on."""
    return [[*key, repr(o.rate), repr(o.before), repr(o.after), f"{o.seconds:.1f}"] for key, o in sorted(known.items())]


def known_from(rows: Iterable[list[str]]) -> dict[tuple[str, ...], Outcome]:
    width = len(COLUMNS) - 4
    return {tuple(row[:width]): Outcome(*(float(text) for text in row[width:])) for row in rows}


def table(known: dict[tuple[str, ...], Outcome], settings: Cell, tasks: Iterable[str], contenders: list[str]) -> str:
    """A line for each task: medians over the seeds that have a grid."""
    shown = [contender for contender in contenders if contender != "grid"]
    columns = ["task", "seeds", "before", "best of grid", "best rate"]
    for name in shown:
        columns += [f"{name}: loss", "rate / best", "share", "worse"]
    rows = []
    for task in tasks:
        found: dict[str, dict[str, Outcome]] = {}
        for key, outcome in known.items():
            if key[0] == task and key[2:5] == settings.key[2:5]:
                found.setdefault(key[1], {})[key[5]] = outcome
            elif key[0] == task and key[2:] == named(settings, "constant-default").key[2:]:
                found.setdefault(key[1], {})["constant-default"] = outcome
        if seeds := [_Seed.of(runs) for runs in found.values() if set(runs) - set(CONTENDERS)]:
            rows.append([task, str(len(seeds)), *_line(seeds, shown)])
    return markdown(columns, rows)


@dataclass(frozen=True)
class _Seed:
    """The runs of a task and seed, and the best one of the grid."""

    runs: dict[str, Outcome]
    best: Outcome

    @classmethod
    def of(cls, runs: dict[str, Outcome]) -> _Seed:
        return cls(runs, min((run for name, run in runs.items() if name not in CONTENDERS), key=lambda run: run.after))


def _line(seeds: list[_Seed], names: Iterable[str]) -> list[str]:
    def median(of: Iterable[float]) -> float:
        return statistics.median([value for value in of if not math.isnan(value)] or [math.nan])

    before, best = median(s.best.before for s in seeds), median(s.best.after for s in seeds)
    line = [f"{before:.3f}", f"{best:.3f}", f"{median(s.best.rate for s in seeds):.1e}"]
    for name in names:
        pairs = [(s.runs[name], s.best) for s in seeds if name in s.runs]
        if not pairs:
            line += [""] * 4
            continue
        share = median((run.before - run.after) / max(best.before - best.after, 1e-9) for run, best in pairs)
        worse = sum(not run.after <= run.before for run, _ in pairs)
        line += [f"{median(run.after for run, _ in pairs):.3f}", f"{median(r.rate / b.rate for r, b in pairs):.2g}"]
        line += [f"{share:.0%}" if math.isfinite(share) else "-", f"{worse} of {len(pairs)}"]
    return line


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=[*TASKS, *LARGE])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--schedule", choices=("linear", "constant"), default="linear")
    parser.add_argument("--settings", default="{}", help="fields of ZOConfig as JSON, for all runs")
    parser.add_argument("--contenders", nargs="+", default=["default", "auto", "grid"], choices=CONTENDERS)
    parser.add_argument("--powers", type=int, nargs=2, metavar=("LOW", "HIGH"), help="a fixed grid, of powers of 2")
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no cell is started after that many")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="of the models")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the models")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the trained models")
    parser.add_argument("--save", metavar="NAME", default="first-run", help="file in benchmarks/results to go on with")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table of what was saved")
    args = parser.parse_args(arguments)
    end = time.monotonic() + args.seconds
    dtype = getattr(torch, args.dtype)
    title = "First runs: held-out loss with no rate given, with an automatic one, and at the rates of a grid"
    name = args.save if args.dtype == "float32" else f"{args.save}-{args.dtype}"
    known = known_from(saved(name, args.device))
    settings = json.dumps(json.loads(args.settings), sort_keys=True)
    tasks = [task for task in args.tasks if able(task)]
    cells = [Cell(t, seed, args.steps, args.schedule, settings, "") for seed in range(args.seeds) for t in tasks]

    def finished(cell: Cell) -> None:
        print(*cell.key, known[cell.key], flush=True)
        save(name, title, COLUMNS, rows_of(known), args.device, write=True, show=False)

    if not args.table:
        if args.powers is None:
            plans = [runs_of(cell, args.contenders) for cell in cells]
        else:
            plans = independent(cells, args.contenders, args.powers)
        with executor(args.workers) as pool:
            if args.workers > 1:  # or every worker would train the same models, one after another
                ready = partial(prepare, folder=args.cache, device=args.device, dtype=dtype)
                for task, seconds in zip(tasks, pool.map(ready, tasks), strict=True):
                    print(f"{task} was ready after {seconds:.1f} s", flush=True)
            work = partial(run, folder=args.cache, device=args.device, dtype=dtype)
            drive(plans, known, work, pool, args.workers, finished, end)
    print(table(known, Cell("", 0, args.steps, args.schedule, settings, ""), tasks, args.contenders))


def able(task: str) -> bool:
    """Whether the packages of a task are installed; says so if not."""
    missing = lacking(task)
    if missing:
        print(f"{task} is left out: it needs {', '.join(missing)}")
    return not missing


if __name__ == "__main__":
    main()
