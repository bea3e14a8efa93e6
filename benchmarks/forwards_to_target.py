"""How many forwards does it take to reach a held-out loss, for each way to learn from them?

Each contender has its rate searched with the first seed, by the loss at the end, and runs the others with it. The
target of a task is a loss that MeZO (`mezo`) reaches; `factor` is how many times fewer forwards a contender took.

    python -m benchmarks.forwards_to_target --workers 2 --save forwards-to-target
    python -m benchmarks.forwards_to_target --save forwards-to-target --table
    python -m benchmarks.forwards_to_target --save forwards-to-target --plot
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
import traceback
from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path

import torch

from . import tasks, text_tasks, well_read
from .contenders import ALL, EVERY, Trainer
from .first_run import best_power, drive, executor
from .report import markdown, save, saved
from .tasks import CACHE, Maker, Task, held_out

TASKS = {
    "domain": well_read.domain,
    "verbalizer": well_read.verbalizer,
    "classify": well_read.classify,
    "modules": well_read.modules,
    "nf4": well_read.nf4,
    "vit": tasks.vit,
    "marker": tasks.marker,
    "swapped": text_tasks.bert_swapped,
    "lm": text_tasks.lm,
    "lm-nf4": text_tasks.lm_nf4,
}
COLUMNS = ["task", "contender", "power", "seed", "forwards", "seconds", "curve"]
#: A contender is at the target once it is there on average of this many measurements.
SMOOTH = 3
MOST_RATES = 9


@dataclass(frozen=True)
class Cell:
    """One run: the rate is the default times 2 to the ``power``."""

    task: str
    contender: str
    power: int
    seed: int
    forwards: int

    @property
    def key(self) -> tuple[str, ...]:
        return (self.task, self.contender, str(self.power), str(self.seed), str(self.forwards))


@dataclass(frozen=True)
class Outcome:
    """The held-out loss against forwards, and the seconds that the steps took."""

    curve: tuple[tuple[float, float], ...]
    seconds: float

    @property
    def end(self) -> float:
        """The mean of the last measurements."""
        return statistics.fmean(loss for _, loss in self.curve[-SMOOTH:])

    @property
    def means(self) -> list[tuple[float, float]]:
        """The running mean of the loss against forwards."""
        return [
            (self.curve[i][0], statistics.fmean(loss for _, loss in self.curve[max(0, i - SMOOTH + 1) : i + 1]))
            for i in range(len(self.curve))
        ]

    def reached(self, target: float) -> float:
        """Forwards after which the running mean is at the target, interpolated; infinite if it never is."""
        for (start, above), (stop, loss) in pairwise(self.means):
            if loss <= target < above:
                return start + (stop - start) * (above - target) / (above - loss)
        return math.inf


@lru_cache
def _task(name: str, folder: Path) -> Task:
    return TASKS[name](Maker(folder))


def prepare(name: str, folder: Path, device: torch.device) -> float:
    """Trains the model of a task, unless it is in the folder; returns the seconds that it took."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    TASKS[name](Maker(folder, device))
    return time.perf_counter() - start


def run(cell: Cell, folder: Path, points: int) -> Outcome:
    """Trains a copy of the task's model; one that fails ends with an infinite loss, and the others go on."""
    torch.set_num_threads(1)
    task = _task(cell.task, folder)
    try:
        return learn(cell, task, points)
    except Exception:
        traceback.print_exc()
        return Outcome(((0.0, math.inf), (float(cell.forwards), math.inf)), 0.0)


def learn(cell: Cell, task: Task, points: int) -> Outcome:
    """Runs the steps at a constant rate, until the loss of one has grown fourfold."""
    trainer = Trainer(EVERY[cell.contender], replace(task, model=copy.deepcopy(task.model)), cell.power, cell.seed)
    before = held_out(task, trainer.model)
    curve, seconds, step = [(0.0, before)], 0.0, 0
    for goal in range(1, points + 1):
        while trainer.forwards < cell.forwards * goal / points:
            batch = task.data(1_000_000 * cell.seed + step)
            start = time.process_time()  # of one thread: others may use the machine
            loss = trainer.step(batch)
            seconds, step = seconds + time.process_time() - start, step + 1
            if not loss < 4.0 * before + 2.0:
                return Outcome((*curve, (float(cell.forwards), math.inf)), seconds)
        found = held_out(task, trainer.model)
        curve.append((trainer.forwards, found if math.isfinite(found) else math.inf))
    return Outcome(tuple(curve), seconds)


def search(cell: Cell, seeds: int, most: int = MOST_RATES) -> Generator[Cell, Outcome, None]:
    """The best power of 2 with the first seed, a factor of 4 apart and then 2, and with it the other seeds."""

    def measured(power: int) -> Generator[Cell, Outcome, float]:
        outcome = yield replace(cell, power=power)
        return outcome.end

    power = yield from best_power(cell.power, most, measured)
    for seed in range(1, seeds):
        yield replace(cell, power=power, seed=seed)


# Results


def rows_of(known: dict[tuple[str, ...], Outcome]) -> list[list[str]]:
    return [
        [*key, f"{found.seconds:.1f}", " ".join(f"{at:g}:{loss:.5g}" for at, loss in found.curve)]
        for key, found in sorted(known.items())
    ]


def known_from(rows: Iterable[list[str]]) -> dict[tuple[str, ...], Outcome]:
    found = {}
    for *key, seconds, curve in rows:
        pairs = (point.split(":") for point in curve.split())
        found[tuple(key)] = Outcome(tuple((float(at), float(loss)) for at, loss in pairs), float(seconds))
    return found


def best(known: dict[tuple[str, ...], Outcome], task: str, contender: str, forwards: int) -> tuple[int, list[Outcome]]:
    """The best rate of a contender with the first seed, and its runs with that rate; none if it has none."""
    found = {
        (int(key[2]), int(key[3])): outcome
        for key, outcome in known.items()
        if key[:2] == (task, contender) and key[4] == str(forwards)
    }
    first = [power for power, seed in found if seed == 0]
    if not first:
        return 0, []
    power = min(first, key=lambda power: (found[power, 0].end, power))
    return power, [outcome for (each, _), outcome in sorted(found.items()) if each == power]


def target_of(runs: list[Outcome], share: float) -> float:
    """The loss at which MeZO has made this share of its way to the lowest running mean, the median of its runs."""
    before = runs[0].curve[0][1]
    return before - share * (before - statistics.median(min(loss for _, loss in run.means) for run in runs))


def table(known: dict[tuple[str, ...], Outcome], names: list[str], contenders: list[str], forwards: int) -> str:
    """A line for each task and contender; medians over the seeds, and the range of the loss at the end."""
    columns = ["task", "contender", "seeds", "rate", "loss at the end", "half way", "factor", "all the way", "factor"]
    columns += ["ms a forward"]
    lines = []
    for task in names:
        _, mezo = best(known, task, "mezo", forwards)
        if not mezo:
            continue
        targets = [target_of(mezo, share) for share in (0.5, 1.0)]
        base = [statistics.median(run.reached(target) for run in mezo) for target in targets]
        lines.append([task, "before", "", "", f"{mezo[0].curve[0][1]:.3f}", *[""] * 5])
        for contender in contenders:
            power, runs = best(known, task, contender, forwards)
            if not runs:
                continue
            ends = sorted(run.end for run in runs)
            line = [
                "",
                contender,
                str(len(runs)),
                f"2^{power}",
                f"{statistics.median(ends):.3f} ({ends[0]:.3f} to {ends[-1]:.3f})",
            ]
            for target, reference in zip(targets, base, strict=True):
                took = statistics.median(run.reached(target) for run in runs)
                shown = f"{took:.0f}" if math.isfinite(took) else "never"
                line += [shown, f"{min(reference, forwards) / took:.2g}" if math.isfinite(took) else "-"]
            spent = statistics.median(1000 * run.seconds / max(run.curve[-1][0], 1) for run in runs)
            lines.append([*line, f"{spent:.0f}"])
    return markdown(columns, lines)


def plot(known: dict[tuple[str, ...], Outcome], names: list[str], contenders: list[str], forwards: int) -> Path:
    """Held-out loss against forwards, the mean of the seeds, one panel for each task."""
    from .plots import IN_DOCS, plt

    shown = [name for name in names if best(known, name, "mezo", forwards)[1]]
    rows = -(-len(shown) // 3)
    figure, panels = plt.subplots(rows, 3, figsize=(11, 3 * rows), squeeze=False)
    for panel, task in zip(panels.flat, shown, strict=False):
        for index, contender in enumerate(contenders):
            _, runs = best(known, task, contender, forwards)
            if runs:
                points = [*zip(*(run.curve for run in runs), strict=False)]
                at = [statistics.fmean(x for x, _ in point) for point in points]
                panel.plot(
                    at, [statistics.fmean(y for _, y in point) for point in points], color=f"C{index}", label=contender
                )
        panel.set_title(task, fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels.flat[len(shown) :]:
        panel.axis("off")
    panels.flat[0].legend(frameon=False, fontsize=7)
    figure.supxlabel("forwards (AdamW: each with a backward pass)", fontsize=8)
    figure.tight_layout()
    path = IN_DOCS / "forwards-to-target.png"
    figure.savefig(path, dpi=130)
    return path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--contenders", nargs="+", default=list(ALL), choices=EVERY)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--forwards", type=int, default=1000)
    parser.add_argument("--points", type=int, default=20, help="measurements of the held-out loss")
    parser.add_argument("--power", type=int, default=1, help="the first rate, as a power of 2 times the default")
    parser.add_argument("--rates", type=int, default=MOST_RATES, help="the most that are tried with the first seed")
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no run is started after that many")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the trained models")
    parser.add_argument("--pretrain", type=torch.device, default=torch.device("cpu"), help="where models are trained")
    parser.add_argument("--save", metavar="NAME", default="forwards-to-target", help="file in benchmarks/results")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table of what was saved")
    parser.add_argument("--plot", action="store_true", help="run nothing, draw what was saved")
    args = parser.parse_args(arguments)
    end = time.monotonic() + args.seconds
    title = "Held-out loss against forwards"
    cpu = torch.device("cpu")
    known = known_from(saved(args.save, cpu))

    def finished(cell: Cell) -> None:
        found = known[cell.key]
        print(*cell.key, f"{found.curve[0][1]:.4f} -> {found.end:.4f}, {found.seconds:.1f} s", flush=True)
        save(args.save, title, COLUMNS, rows_of(known), cpu, write=True, show=False)

    if args.plot:
        print(plot(known, args.tasks, args.contenders, args.forwards))
        return
    if not args.table:
        with executor(args.workers) as pool:
            if args.workers > 1:  # or every worker would train the same models, one after another
                ready = partial(prepare, folder=args.cache, device=args.pretrain)
                for task, seconds in zip(args.tasks, pool.map(ready, args.tasks), strict=True):
                    print(f"{task} was ready after {seconds:.1f} s", flush=True)
            cells = [Cell(t, c, args.power, 0, args.forwards) for c in args.contenders for t in args.tasks]
            work = partial(run, folder=args.cache, points=args.points)
            drive(
                [search(cell, args.seeds, args.rates) for cell in cells], known, work, pool, args.workers, finished, end
            )
    print(table(known, args.tasks, args.contenders, args.forwards))


if __name__ == "__main__":
    main()
