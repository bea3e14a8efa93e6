"""What it costs to train one model in many ways, side by side, and what each way brings.

Cost: a Llama of 54.9 M weights in float32, each way in processes of its own, forked after the imports. The memory is
the peak of the process above the imports (RssAnon, sampled every 5 ms) and what is left of it between steps, where what
is freed is returned (`return_what_is_freed`): medians of some processes, and the range of the peaks.
Processor time is compared with that of a forward of the same model, in turns. GaLore, APOLLO and ZeRO-Offload need the
packages galore-torch, apollo-torch and deepspeed (which compiles for minutes at first, and is imported in the process
that is measured); a way that cannot run says so.

    python -m benchmarks.rivals --save

Learning: the table of what `benchmarks.forwards_to_target` has saved as rivals-curves.

    python -m benchmarks.rivals --learning verbalizer --save
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import rival_methods
from .contenders import EVERY, TRIED, Contender, Trainer, activations, lora
from .forwards_to_target import Outcome, best, known_from
from .offload_memory import Peak, return_what_is_freed, status
from .report import save, saved
from .rival_methods import Start, at
from .step_overhead import llama_60m
from .tasks import Task, cross_entropy
from .text_tasks import in_nf4

CPU = torch.device("cpu")
#: The rate plays no part in the cost; with one, a step has no other forwards than those of its method.
RATE: dict[str, Any] = {"lr": 1e-7, "eps": 1e-3}


def forward_alone(model: nn.Module, rate: float, seed: int) -> Callable[[Callable[[], Tensor]], float]:
    @torch.no_grad()
    def step(loss: Callable[[], Tensor]) -> float:
        return float(loss())

    return step


def first_order(start: Start, wrap: Callable[[Task], Task] | None = None) -> Contender:
    return Contender(wrap, start=at(1e-7, start))


def nf4_lora(task: Task) -> Task:
    return lora(in_nf4(task))


def nf4_activations(task: Task) -> Task:
    return activations()(in_nf4(task))


IN_PLACE = "ours, streamed from disk"
WAYS: dict[str, Contender] = {
    "forward alone": first_order(forward_alone),
    "MeZO as published": first_order(rival_methods.published_mezo),
    "MeZO, package mezo 0.0.1": first_order(rival_methods.packaged_mezo),
    "ours": Contender(settings=RATE),
    "ours, low rank": Contender(settings={**RATE, "noise": "low_rank"}),
    "ours, momentum": Contender(settings={**RATE, "rule": "momentum"}),
    "ours, conservative": Contender(settings={**RATE, "estimator": "conservative"}),
    "ours, Adam": first_order(rival_methods.zo_adam),
    "ours, along the activations": Contender(activations(), RATE),
    "ours, along the activations, nf4": Contender(nf4_activations, RATE),
    IN_PLACE: Contender(settings=RATE),
    "AdamW": first_order(rival_methods.adamw),
    "AdamW, checkpointing": first_order(rival_methods.checkpointed),
    "SGD in the backward pass": first_order(rival_methods.in_backward),
    "one layer at a time, AdamW": first_order(rival_methods.blockwise),
    "GaLore": first_order(rival_methods.galore),
    "APOLLO": first_order(rival_methods.apollo),
    "ZeRO-Offload": first_order(rival_methods.zero_offload),
    "LoRA, AdamW": first_order(rival_methods.adamw, lora),
    "LoRA, AdamW, checkpointing": first_order(rival_methods.checkpointed, lora),
    "LoRA on nf4 (QLoRA)": first_order(rival_methods.adamw, nf4_lora),
}


#: Contenders of the learning that are in the plot: their names here, and whether they need gradients.
SHOWN: dict[str, tuple[str, bool]] = {
    "published-mezo": ("MeZO as published", False),
    "mezo": ("ours", False),
    "activations": ("ours, along the activations", False),
    "lozo": ("ours, low rank", False),
    "zo-adam": ("ours, Adam", False),
    "conservative": ("ours, conservative", False),
    "adamw": ("AdamW", True),
    "adamw-lora": ("LoRA, AdamW", True),
    "adamw-qlora": ("LoRA on nf4 (QLoRA)", True),
    "galore": ("GaLore", True),
    "apollo": ("APOLLO", True),
    "blockwise": ("one layer at a time, AdamW", True),
    "sgd-in-backward": ("SGD in the backward pass", True),
}


@dataclass(frozen=True)
class Cost:
    """Bytes above the imports, and processor seconds of a step and of a forward."""

    peak: float = math.nan
    rest: float = math.nan
    step: float = math.nan
    forward: float = math.nan


# In a process of its own


def task_of(model: nn.Module, rows: int, length: int) -> Task:
    """Random tokens."""

    def data(step: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(step % 2**31)
        ids = torch.randint(0, 32000, (rows, length + 1), generator=generator)
        return ids[:, :-1], ids[:, 1:]

    return Task(model, data, cross_entropy)


def held() -> float:
    """Bytes of anonymous memory of this process, without what has been freed and is kept for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return status()["RssAnon"] * 2**20


def trainer_of(name: str, rows: int, length: int, folder: Path, began: Callable[[], object]) -> Trainer:
    """The model and what trains it; ``began`` is called once the weights are there, or before they are streamed."""
    if name == IN_PLACE:
        from transformers import LlamaForCausalLM

        from hf_zo import from_pretrained_offloaded

        began()
        model = from_pretrained_offloaded(LlamaForCausalLM, folder, offload_dir=folder / "blocks")
    else:
        torch.manual_seed(0)
        model = built()  # which takes more for a moment, as tied embeddings are made twice
        began()
    return Trainer(WAYS[name], task_of(model.eval(), rows, length), 0, 0)


def built() -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(llama_60m())


def memory(name: str, rows: int, length: int, folder: Path) -> Cost:
    """Memory of two steps. The second is the first that finds the optimizer's state."""
    return_what_is_freed()
    base = held()
    peak = Peak()

    def began() -> None:
        peak.values = status()
        peak.start()

    trainer = trainer_of(name, rows, length, folder, began)
    for step in range(2):
        trainer.step(trainer.task.data(step))
    peak.stop.set()
    peak.join()
    return Cost(peak.values["RssAnon"] * 2**20 - base, held() - base)


def times_of(name: str, rows: int, length: int, folder: Path, rounds: int) -> Cost:
    """Medians of rounds in which a step and a forward of the plain model take turns, after a step each."""
    trainer = trainer_of(name, rows, length, folder, lambda: None)
    plain = Trainer(WAYS["forward alone"], task_of(built().eval(), rows, length), 0, 0)
    times: dict[Trainer, list[float]] = {trainer: [], plain: []}
    for step in range(rounds + 1):
        for one, spent in times.items():
            batch = one.task.data(step)
            start = time.process_time()
            one.step(batch)
            spent.append(time.process_time() - start)
    return Cost(step=statistics.median(times[trainer][1:]), forward=statistics.median(times[plain][1:]))


def alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a forked process, or a text that says what went wrong in it."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(there, work, arguments))
    process.start()
    there.close()
    try:
        found = here.recv()
    except EOFError:
        found = "the process ended"
    process.join()
    return found


def _answer(pipe: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        pipe.send(work(*arguments))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


# Tables


def costs(args: argparse.Namespace) -> None:
    """Runs every way, and prints a line for each as it ends."""
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    from transformers import LlamaForCausalLM, Trainer  # noqa: F401

    import hf_zo  # noqa: F401
    import zo_core  # noqa: F401

    torch.set_num_threads(1)
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as path:
        weights = alone(written, Path(path))
        for name in args.ways:
            of = name, args.rows, args.length, Path(path)
            found = [alone(memory, *of) for _ in range(args.runs)]
            found += [alone(times_of, *of, args.rounds)] if args.rounds else []
            failed = [one for one in found if isinstance(one, str)]
            rows.append([name, *([failed[0][:60], *[""] * 4] if failed else cells(found, weights))])
            print(rows[-1], flush=True)
    tokens = args.rows * args.length
    columns = ["", "peak, MB", "between steps, MB", "bytes a weight", "processor s a step", "÷ a forward"]
    title = f"Training a Llama of {weights / 1e6:.1f} M float32 weights, {tokens:,} tokens: memory above imports, time"
    save(f"rivals-cost-{tokens}tokens", title, columns, rows, CPU, write=args.save)


def written(folder: Path) -> int:
    """Writes the model to a folder; returns how many weights it has."""
    model = built()
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def cells(found: list[Cost], weights: int) -> list[str]:
    """Medians of the processes that measured memory, the range of their peaks, and the times of the one that did."""
    peaks = sorted(one.peak / 1e6 for one in found if one.peak > 0)
    rest = statistics.median(one.rest for one in found if one.peak > 0)
    sizes = [f"{statistics.median(peaks):.0f} ({peaks[0]:.0f} to {peaks[-1]:.0f})", f"{rest / 1e6:.0f}"]
    timed = [[f"{one.step:.2f}", f"{one.step / one.forward:.1f}"] for one in found if one.step > 0]
    return [*sizes, f"{rest / weights:.1f}", *(timed[0] if timed else ["", ""])]


def at_forwards(run: Outcome, forwards: float) -> float:
    """The running mean of the loss at this many forwards, interpolated; at the end if there were fewer."""
    points = run.means
    for (start, first), (stop, last) in pairwise(points):
        if start <= forwards <= stop:
            return first + (last - first) * (forwards - start) / (stop - start)
    return points[-1][1]


def learning(args: argparse.Namespace) -> None:
    """Held-out loss after equal forwards, after equal processor time and at the end, with the best rate of each."""
    known = known_from(saved("rivals-curves", CPU))
    longest = {key[:2]: int(key[4]) for key in sorted(known, key=lambda key: int(key[4])) if key[0] == args.learning}
    ways = {name: best(known, args.learning, name, n)[1] for (_, name), n in longest.items()}
    common = min(longest.values())
    seconds = statistics.median(run.seconds for run in ways["published-mezo"])
    rows = [["before", "", *[f"{ways['published-mezo'][0].curve[0][1]:.3f}"] * 2, *[""] * 3]]
    for name in (
        name for name in EVERY if name in ways and ((name in TRIED) == args.tried or name == "published-mezo")
    ):
        runs = ways[name]
        spent = statistics.median(run.seconds / max(run.curve[-1][0], 1) for run in runs)
        columns = [[at_forwards(run, count) for run in runs] for count in (common, seconds / spent)]
        columns.append([run.end for run in runs])
        shown = [f"{statistics.median(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})" for losses in columns]
        rows.append([name, str(len(runs)), *shown, str(longest[args.learning, name]), f"{1000 * spent:.0f}"])
    heads = ["", "seeds", f"after {common} forwards", f"after {seconds:.1f} processor s", "at the end", "forwards"]
    title = f"Held-out loss on `{args.learning}`, the best rate of each: median of the seeds, and their range"
    save(
        f"{'subspaces' if args.tried else 'rivals'}-learning-{args.learning}",
        title,
        [*heads, "ms a forward"],
        rows,
        CPU,
        write=args.save,
    )


def plot(task: str) -> Path:
    """What is learnt in equal processor time against the memory that it takes."""
    from .plots import IN_DOCS, newest, plt

    cost_of, learnt = newest("rivals-cost-256tokens"), newest(f"rivals-learning-{task}")
    peaks = {row[0]: float(row[1].split()[0]) for row in cost_of["rows"] if row[5]}
    figure, axes = plt.subplots(figsize=(7, 4))
    names = {}
    for row in learnt["rows"][1:]:
        name, backward = SHOWN.get(row[0], ("", False))
        if name in peaks:
            names[name] = peaks[name], float(row[3].split()[0])
            axes.plot(*names[name], "s" if backward else "o", color="C1" if backward else "C0")
    axes.set_xlabel(f"peak memory, MB ({cost_of['title'].split(':')[0].removeprefix('Training a ')})", fontsize=8)
    axes.set_ylabel(f"held-out loss on {task}, {learnt['columns'][3]}", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(right=1.15 * axes.get_xlim()[1])
    figure.tight_layout()
    label(axes, names)
    path = IN_DOCS / "rivals.png"
    figure.savefig(path, dpi=130)
    return path


def label(axes: Any, names: dict[str, tuple[float, float]]) -> None:
    """Writes each name beside its point, where it covers neither a point nor a name that is there already."""
    from matplotlib.transforms import Bbox

    renderer = axes.figure.canvas.get_renderer()
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in axes.transData.transform([*names.values()])]
    sides = [
        (6, 0, "left"),
        (-6, 0, "right"),
        *((x, y, s) for y in (9, -9, 18, -18) for x, s in ((4, "left"), (-4, "right"))),
    ]
    for name, place in sorted(names.items(), key=lambda item: item[1]):
        for x, y, side in sides:
            text = axes.annotate(
                name, place, (x, y), textcoords="offset points", ha=side, va="center", fontsize=7, color="#555"
            )
            box = text.get_window_extent(renderer)
            if box.x0 >= axes.bbox.x0 and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3, help="processes that measure memory")
    parser.add_argument("--rounds", type=int, default=2, help="of timed steps; 0 measures memory alone")
    parser.add_argument("--learning", metavar="TASK", help="run nothing; the table of the saved curves of a task")
    parser.add_argument("--tried", action="store_true", help="with --learning: the experiments of docs/tried.md")
    parser.add_argument("--plot", metavar="TASK", help="run nothing; draw what was saved")
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    args = parser.parse_args()
    if args.plot:
        print(plot(args.plot))
    elif args.learning:
        learning(args)
    else:
        costs(args)


if __name__ == "__main__":
    main()
