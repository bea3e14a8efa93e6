"""The host's part of a step: hooks and the function mode of a probe, and handing over between streamed probes.

On a GPU this Python runs beside the kernels, and decides the time of a step for models of up to a few billion
parameters. It needs no GPU to be measured: the passes over the weights are replaced by nothing, and the model's own
forward is measured and subtracted. What is measured is the processor time of all threads, of which other programs on
the machine take none; what a thread waits for another one is not in it.

    python -m benchmarks.host_overhead                     # 12, 24 and 48 layers
    python -m benchmarks.host_overhead --layers 24 --save
    python -m benchmarks.host_overhead --before ../main    # beside another checkout, in turns

Layers are copied at once, as on a GPU; see `zo_core.probing.layers.MODULE_BY_MODULE`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from zo_core import ZeroOrder
from zo_core.noise import Direction

from .report import save

CPU = torch.device("cpu")
COLUMNS = ["layers", "plain forward", "hooks and mode", "handing over", "step, resident", "step, streamed"]
HIDDEN, LENGTH, VOCABULARY = 32, 8, 64


def model_of(layers: int) -> nn.Module:
    """An OPT whose arithmetic takes hardly any time: 16 tensors per layer, as in one of any width."""
    torch.manual_seed(0)
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            word_embed_proj_dim=HIDDEN,
            ffn_dim=2 * HIDDEN,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
        )
    ).eval()


@contextmanager
def without_noise() -> Iterator[None]:
    """A context in which moving weights along a direction takes no time, and moves nothing."""

    def leave(self: Direction, theta: Tensor, decay: float = 1.0, out: Tensor | None = None) -> Tensor:
        return theta if out is None else out.copy_(theta)

    with patch.object(Direction, "add_to", leave):
        yield


@contextmanager
def at_once() -> Iterator[None]:
    """A context in which layers are copied at once, as on a GPU; another checkout may not know of that."""
    module = sys.modules.get("zo_core.probing.layers")
    if module is None:
        yield
    else:
        with patch.object(module, "MODULE_BY_MODULE", frozenset()):
            yield


def processor_time(run: Callable[[], object]) -> float:
    """Seconds that all threads of this process compute during one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def times(layers: int, repeats: int) -> list[float]:
    """Milliseconds per layer: a plain forward, a resident step, and a streamed step (lowest, interleaved)."""
    ids = torch.arange(LENGTH)[None]
    models = [model_of(layers) for _ in range(3)]
    resident = ZeroOrder(models[1], lr=1e-9, brake=None)
    streamed = ZeroOrder(models[2], lr=1e-9, brake=None, offload="cpu")

    def loss(model: nn.Module) -> Tensor:
        found: Tensor = model(input_ids=ids, labels=ids).loss
        return found

    def plain() -> None:
        with torch.no_grad():
            loss(models[0])

    runs: list[Callable[[], object]] = [
        plain,
        lambda: resident.step(lambda: loss(models[1])),
        lambda: streamed.step(lambda: loss(models[2])),
    ]
    try:
        for run in runs * 3:  # the first steps look closely
            run()
        found = [[processor_time(run) for run in runs] for _ in range(repeats)]
    finally:
        streamed.close()
    return [1e3 * min(column) / layers for column in zip(*found, strict=True)]


def row(layers: int, repeats: int) -> list[str]:
    """A row of the table: two probes per step; "handing over" is what a streamed step takes beyond a resident one."""
    with without_noise(), at_once():
        plain, resident, streamed = times(layers, repeats)
    numbers = plain, resident / 2 - plain, (streamed - resident) / 2, resident, streamed
    return [str(layers), *(f"{number:.3f}" for number in numbers)]


#: Runs this very file among the packages of another checkout.
AS_MODULE = """
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("benchmarks.host_overhead", {path!r})
module = module_from_spec(spec)
spec.loader.exec_module(module)
module.main({arguments!r})
"""


def beside(folder: str, layers: int, repeats: int, rounds: int) -> list[list[str]]:
    """Rows of another checkout and of this one, from processes that take turns: for each number the lowest."""
    found: dict[str, list[list[float]]] = {"before": [], "after": []}
    arguments = ["--layers", str(layers), "--repeats", str(repeats)]
    command = [sys.executable, "-c", AS_MODULE.format(path=os.path.abspath(__file__), arguments=arguments)]
    for _ in range(rounds):
        for name, where in (("before", os.path.abspath(folder)), ("after", os.getcwd())):
            run = subprocess.run(
                command, cwd=where, env=os.environ | {"PYTHONPATH": where}, capture_output=True, text=True, check=True
            )
            line = next(line for line in run.stdout.splitlines() if line.startswith(f"| {layers} "))
            found[name].append([float(cell) for cell in line.strip("| ").split(" | ")[1:]])
    rows = []
    for name, runs in found.items():
        plain, _, _, resident, streamed = map(min, zip(*runs, strict=True))
        numbers = plain, resident / 2 - plain, (streamed - resident) / 2, resident, streamed
        rows.append([f"{layers}, {name}", *(f"{number:.3f}" for number in numbers)])
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 24, 48])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--before", help="another checkout, to measure in turns with this one")
    parser.add_argument("--rounds", type=int, default=5, help="with --before")
    parser.add_argument("--save", action="store_true", help="write the table to benchmarks/results")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.before is None:
        rows = [row(layers, args.repeats) for layers in args.layers]
    else:
        rows = [r for layers in args.layers for r in beside(args.before, layers, args.repeats, args.rounds)]
    title = "The host's part of a step without noise: ms of processor time per layer (per layer and probe in between)"
    if args.before is not None:
        title += f"; lowest of {args.rounds} runs in turns"
    save(
        "host-overhead" if args.before is None else "host-overhead-before-after",
        title,
        COLUMNS,
        rows,
        CPU,
        write=args.save,
    )


if __name__ == "__main__":
    main()
