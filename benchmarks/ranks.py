"""Two processes on one machine: what they exchange, what a step takes, and what they learn in each mode.

    python -m benchmarks.ranks --save                    # bytes and times
    python -m benchmarks.ranks --learning --save         # "directions" against "data", 3 seeds, in one process

Times are medians of ratios between steps that are measured in turn, round by round. They need a machine with a free
core for each process: other work disturbs them. What two processes learn is what one computes that measures the
directions or the micro-batches of both: the tests hold that to the bit.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from zo_core import ZeroOrder

from .learning import accuracy, batch, pretrained
from .report import save

PROCESSES = 2
#: Settings whose steps are timed: the mode, and the directions of each process.
TIMED = [("directions", 1), ("directions", 4), ("data", 1), ("points", 1)]
RATES = [2e-4 * 2**power for power in range(5)]


def model_of() -> nn.Module:
    """A transformer of 3.2 million weights."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(256, 8, 1024, dropout=0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).eval()


class Sent:
    """Counts the bytes that this process passes to others, and the seconds for which it waits for theirs."""

    def __init__(self) -> None:
        self.bytes, self.seconds = 0, 0.0
        self.gather = dist.all_gather
        dist.all_gather = self  # type: ignore[assignment]

    def __call__(self, rows: list[Tensor], own: Tensor, **how: Any) -> Any:
        self.bytes += own.numel() * own.element_size()
        start = time.perf_counter()
        found = self.gather(rows, own, **how)
        self.seconds += time.perf_counter() - start
        return found


def engine(ranks: str | None, directions: int) -> tuple[ZeroOrder, Callable[[], Any]]:
    """An engine, and a function that takes a step of it."""
    model, rows = model_of(), torch.randn(2, 64, 256, generator=torch.Generator().manual_seed(0))
    zo = ZeroOrder(model, lr=0.0, ranks=ranks, num_probes=directions)
    return zo, lambda: zo.step(lambda: model(rows).square().mean())


def seconds(step: Callable[[], Any]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def measure(rank: int, folder: str, rounds: int) -> None:
    """The work of one process; rank 0 writes the table's rows."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    sent, rows = Sent(), []
    for mode, directions in TIMED:
        together, step = engine(mode, directions)
        _, beside = engine(None, directions)
        step(), beside()
        found: dict[str, list[float]] = {"one": [], "beside": [], "together": [], "waiting": []}
        before = sent.bytes
        for _ in range(rounds):
            dist.barrier()
            if rank == 0:
                found["one"].append(seconds(beside))
            dist.barrier()
            found["beside"].append(seconds(beside))
            dist.barrier()
            waited = sent.seconds
            found["together"].append(seconds(step))
            found["waiting"].append(sent.seconds - waited)
        if rank == 0:
            rows.append(row_of(mode, directions, together, found, (sent.bytes - before) // rounds))
    if rank == 0:
        torch.save(rows, f"{folder}/rows")
    dist.barrier()
    dist.destroy_process_group()


def row_of(mode: str, directions: int, zo: ZeroOrder, found: dict[str, list[float]], count: int) -> list[str]:
    size = sum(parameter.numel() * parameter.element_size() for parameter in zo.model.parameters())

    def ratio(name: str, by: str) -> str:
        return f"{statistics.median(a / b for a, b in zip(found[name], found[by], strict=True)):.2f}"

    return [
        mode,
        str(directions),
        str(count),
        f"{count / size:.1e}",
        ratio("together", "one"),
        ratio("beside", "one"),
        ratio("waiting", "together"),
    ]


def exchange_alone(rank: int, folder: str) -> None:
    """What the exchange of a step takes if nobody has to be waited for: empty steps, one after another."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-2", rank=rank, world_size=PROCESSES)
    torch.manual_seed(0)
    tiny, row = nn.Linear(3, 1), torch.tensor([[0.3, 1.0, 3.0]])
    times = {}
    for ranks in ("directions", None):
        zo = ZeroOrder(tiny, lr=0.0, ranks=ranks)
        step = partial(zo.step, lambda: tiny(row).sum())
        step()
        times[ranks] = statistics.median(seconds(step) for _ in range(300))
    if rank == 0:
        torch.save((times["directions"], times[None]), f"{folder}/exchange")
    dist.barrier()
    dist.destroy_process_group()


def learnt(mode: str, rows: int, forwards: int, lr: float, seed: int, model: nn.Module) -> float:
    """Accuracy after a run of `PROCESSES` processes with so many forwards each, computed in this process."""
    count = PROCESSES if mode == "directions" else 1
    zo = ZeroOrder(model, seed=seed, lr=lr, eps=1e-3, num_probes=count, brake=None)
    zo.first_steps = None  # it would call the closure once more

    def loss(rank: int, step: int) -> Tensor:
        tokens, classes = batch(rows, 1_000_000 * (seed + 1) + PROCESSES * step + rank, shifted=True)
        return F.cross_entropy(model(tokens), classes)

    for step in range(forwards // 2):
        if mode == "directions":
            turns = iter([rank for rank in range(PROCESSES) for _ in range(2)])
            zo.step(lambda: loss(next(turns), step))  # noqa: B023
            continue
        for rank in range(PROCESSES if mode == "data" else 1):
            zo.measure(partial(loss, rank, step))
        for group in zo.optimizer.param_groups:  # the losses of both are summed, and "data" takes their mean
            group["lr"] = lr / (PROCESSES if mode == "data" else 1)
        zo.optimizer.step()
    return accuracy(model)


def learning(forwards: int, seeds: int) -> list[list[str]]:
    """The best rate of each mode, chosen by the mean over the seeds."""
    models = [pretrained(seed) for seed in range(seeds)]
    rows = []
    for size in (64, 8):
        for mode in ("one process", "directions", "data"):
            found = {
                lr: [learnt(mode, size, forwards, lr, seed, copy.deepcopy(model)) for seed, model in enumerate(models)]
                for lr in RATES
            }
            lr = max(found, key=lambda rate: statistics.mean(found[rate]))
            edge = " (edge)" if lr in (RATES[0], RATES[-1]) else ""
            each = [f"{value:.3f}" for value in found[lr]]
            rows.append([str(size), mode, f"{lr:.1e}{edge}", f"{statistics.mean(found[lr]):.3f}", *each])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--learning", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--forwards", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if args.learning:
        title = (
            f"Held-out accuracy on the shifted task, {PROCESSES} processes with {args.forwards} forwards each, best of "
            f"{len(RATES)} rates"
        )
        columns = ["batch", "mode", "rate", "mean", *(f"seed {seed}" for seed in range(args.seeds))]
        save("ranks-learning", title, columns, learning(args.forwards, args.seeds), device, write=args.save)
        return
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (folder, args.rounds), PROCESSES)
        mp.spawn(exchange_alone, (folder,), PROCESSES)
        rows = torch.load(Path(folder) / "rows")
        several, alone = torch.load(Path(folder) / "exchange")
    title = (
        f"Two processes, 3.2 million weights; the exchange of a step takes {1e3 * (several - alone):.2f} ms (a "
        f"step of a model of four weights {1e3 * several:.2f} ms, and {1e3 * alone:.2f} ms without it)"
    )
    columns = [
        "mode",
        "directions of each",
        "bytes a step",
        "of the model's",
        "time over one process",
        "without exchange",
        "share spent waiting",
    ]
    save("ranks", title, columns, rows, device, write=args.save)


if __name__ == "__main__":
    main()
