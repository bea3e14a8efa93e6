"""Backpropagation through the last blocks, forward passes for the rest: what it costs, and what it learns a step.

Memory: peaks of RssAnon above the imports, sampled every 5 ms, each way in a process of its own, on a model of Llama's
shape. Learning: two tasks for the model of `benchmarks.learning`, at equal steps. In one, a quarter of the answers have
changed, as there; in the other, the token before the marker is asked for, not the one after it, so that attention has
to change. The forward passes have the rate that is best for them alone, and every backpropagation has its best of a
short list, by the mean held-out loss.

    python -m benchmarks.hybrid --save                   # both tables
    python -m benchmarks.hybrid --only learning --task before
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zo_core import ZeroOrder

from .learning import BATCH, CLASSES, TOKENS, batch, pretrained
from .learning import LENGTH as LENGTH_OF_ROW
from .low_rank_learning import mean
from .offload_memory import Peak, status
from .report import save

CPU = torch.device("cpu")
#: Shape of the model for memory, and of its batch.
HIDDEN, LAYERS, VOCABULARY, ROWS, LENGTH = 256, 8, 512, 8, 128

#: Ways to train it: the modules under backprop; None is AdamW for all weights.
WAYS: dict[str, tuple[str, ...] | None] = {
    "forward passes only": (),
    "backprop through the head": ("lm_head", "model.norm"),
    **{
        f"… and the last {count} of {LAYERS} layers": (
            "lm_head",
            "model.norm",
            *(f"model.layers.{index}" for index in range(LAYERS - count, LAYERS)),
        )
        for count in (1, 2, 4)
    },
    "backprop of everything (AdamW)": None,
}

#: The last modules of the tiny transformer, as they are named under backprop.
HEADS = {"head": ("head",), "head and MLP": ("head", "block.linear2", "block.linear1", "block.norm2")}
RATES = (1e-3, 2e-3, 4e-3)
BACKPROP_RATES = (1e-3, 3e-3, 1e-2)


def run(way: str, steps: int) -> tuple[float, float]:
    """Peak of RssAnon above the imports in MB, and median processor seconds of a step, in this process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    small = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    ZeroOrder(small, lr=0.0, backprop=("1",)).step(lambda: small(torch.ones(64, 64)).mean())
    base, peak, seconds = status(), Peak(), []
    peak.start()
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    names = WAYS[way]
    step = adamw(model) if names is None else ZeroOrder(model, lr=1e-6, backprop=names).step
    for _ in range(steps):
        begin = time.process_time()
        step(lambda: model(input_ids=ids, labels=ids).loss)
        seconds.append(time.process_time() - begin)
    peak.stop.set()
    peak.join()
    return peak.values["RssAnon"] - base["RssAnon"], statistics.median(seconds[1:])


def adamw(model: nn.Module, lr: float = 1e-4) -> Callable[[Callable[[], Tensor]], object]:
    """A step of torch's AdamW on all weights that require a gradient."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)

    def step(closure: Callable[[], Tensor]) -> object:
        closure().backward()
        optimizer.step()
        return optimizer.zero_grad()

    return step


def measured(way: str, steps: int) -> tuple[float, float]:
    """`run` in a process of its own, in which freed memory is returned to the system."""
    command = [sys.executable, "-m", "benchmarks.hybrid", "--run", way, "--steps", str(steps)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    root = Path(__file__).parent.parent
    result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root, env=environment)
    megabytes, seconds = json.loads(result.stdout.splitlines()[-1])
    return megabytes, seconds


def memory(steps: int, *, write: bool) -> None:
    found = {way: measured(way, steps) for way in WAYS}
    least = found["forward passes only"]
    rows = [
        [way, f"{megabytes:.0f}", f"{megabytes / least[0]:.1f}", f"{seconds:.2f}"]
        for way, (megabytes, seconds) in found.items()
    ]
    title = (
        f"Peak memory and processor time of a step, Llama shape of {LAYERS} layers of width {HIDDEN} in float32, "
        f"{ROWS} rows of {LENGTH} tokens"
    )
    save("hybrid-memory", title, ["", "peak, MB", "÷ forward passes only", "CPU s a step"], rows, CPU, write=write)


Make = Callable[[nn.Module, int], Callable[[Callable[[], Tensor]], object]]


def zeroth(lr: float, names: tuple[str, ...] = (), backprop_lr: float = 1e-4) -> Make:
    return lambda model, seed: ZeroOrder(model, lr=lr, seed=seed, backprop=names, backprop_lr=backprop_lr).step


def first(lr: float, names: tuple[str, ...] = ("",)) -> Make:
    """AdamW on the named modules alone."""

    def make(model: nn.Module, seed: int) -> Callable[[Callable[[], Tensor]], object]:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(names))
        return adamw(model, lr)

    return make


def before(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """As `learning.batch`, with the class of the token before the marker."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, TOKENS + 1, (count, LENGTH_OF_ROW), generator=generator)
    place, rows = torch.randint(1, LENGTH_OF_ROW, (count,), generator=generator), torch.arange(count)
    tokens[rows, place] = 0
    return tokens, (tokens[rows, place - 1] - 1) // (TOKENS // CLASSES)


#: Batches of the tasks, by their size and a seed.
TASKS: dict[str, Callable[[int, int], tuple[Tensor, Tensor]]] = {
    "shifted": lambda count, seed: batch(count, seed, shifted=True),
    "before": before,
}


def held_out(model: nn.Module, task: str) -> tuple[float, float]:
    """Loss and accuracy on 2,000 held-out sequences."""
    tokens, classes = TASKS[task](2000, -1)
    with torch.no_grad():
        logits = model(tokens)
    return float(F.cross_entropy(logits, classes)), float((logits.argmax(-1) == classes).float().mean())


def learning(task: str, heads: Sequence[str], seeds: int, steps: int, *, write: bool) -> None:
    starts = [pretrained(seed) for seed in range(seeds)]
    losses, reached = zip(*(held_out(start, task) for start in starts), strict=True)
    rows = [["before", "", *(f"{loss:.3f}" for loss in losses), f"{mean(losses):.3f}", f"{mean(reached):.3f}"]]

    def best(name: str, ways: dict[str, Make]) -> str:
        """Adds the row of the best way, and returns its label."""
        found = {
            label: [trained(start, make, task, seed, steps) for seed, start in enumerate(starts)]
            for label, make in ways.items()
        }
        means = {label: mean(loss for loss, _ in pairs) for label, pairs in found.items()}
        label = min(means, key=lambda each: means[each] if math.isfinite(means[each]) else math.inf)
        losses, reached = zip(*found[label], strict=True)
        rows.append([name, label, *(f"{x:.3f}" for x in losses), f"{mean(losses):.3f}", f"{mean(reached):.3f}"])
        print(rows[-1], means, flush=True)
        return label

    lr = float(best("forward passes alone", {f"{rate:g}": zeroth(rate) for rate in RATES}))
    for name in heads:
        names = HEADS[name]
        best(f"backprop in {name} alone, the rest frozen", {f"{rate:g}": first(rate, names) for rate in BACKPROP_RATES})
        both = {f"{lr:g}, {rate:g}": zeroth(lr, names, rate) for rate in BACKPROP_RATES}
        best(f"backprop in {name}, forward passes for the rest", both)
    best("backprop of everything (AdamW)", {f"{rate:g}": first(rate) for rate in BACKPROP_RATES})
    columns = ["", "best rate", *(f"loss, seed {seed}" for seed in range(seeds)), "mean loss", "mean accuracy"]
    title = f"Held-out loss on the task '{task}' after {steps} steps"
    save(f"hybrid-learning-{task}-{steps}steps", title, columns, rows, CPU, write=write)


def trained(start: nn.Module, make: Make, task: str, seed: int, steps: int) -> tuple[float, float]:
    """Held-out loss and accuracy after training a copy."""
    model = copy.deepcopy(start)
    step = make(model, seed)
    for index in range(1, steps + 1):
        tokens, classes = TASKS[task](BATCH, 1_000_000 * (seed + 1) + index)
        step(lambda: F.cross_entropy(model(tokens), classes))  # noqa: B023
    return held_out(model, task)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["memory", "learning"])
    parser.add_argument("--task", choices=TASKS, default="shifted")
    parser.add_argument("--heads", choices=HEADS, nargs="+", default=list(HEADS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=5, help="for memory")
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(run(args.run, args.steps)))
        return
    if args.only != "learning":
        memory(args.steps, write=args.save)
    if args.only != "memory":
        learning(args.task, args.heads, args.seeds, args.learning_steps, write=args.save)


if __name__ == "__main__":
    main()
