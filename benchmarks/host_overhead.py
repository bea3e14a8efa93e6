"""The host's part of a step: hooks and the function mode of a probe, and handing over between streamed probes.

On a GPU this Python runs beside the kernels, and decides the time of a step for models of up to a few billion
parameters. It needs no GPU to be measured: the passes over the weights are replaced by nothing, and the model's own
forward is measured and subtracted. What it takes to prepare passes for Triton's kernels is measured apart, with
launches that do nothing. What is measured is the processor time of all threads, of which other programs on
the machine take none; what a thread waits for another one is not in it.

    python -m benchmarks.host_overhead                     # 12, 24 and 48 layers
    python -m benchmarks.host_overhead --layers 24 --save
    python -m benchmarks.host_overhead --before ../main    # beside another checkout, in turns

Layers are copied at once, as on a GPU; see `zo_core.probing.layers.MODULE_BY_MODULE`.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from zo_core import ZeroOrder
from zo_core.noise import Direction

from .report import save

CPU = torch.device("cpu")
COLUMNS = ["layers", "plain forward", "hooks and mode", "handing over", "kernels", "step, resident", "step, streamed"]
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
def without_launches() -> Iterator[None]:
    """A context in which passes are prepared for Triton's kernels, whose launches move nothing."""
    from zo_core.noise import changes, triton_backend

    class Kernel:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *_, **__: None

    launch, add_alike = triton_backend._launch, getattr(triton_backend, "add_alike", None)

    def leave(variant: Any, group: Any) -> None:
        launch(variant, group)
        for work in group:
            if work.target is not work.source:
                work.target.copy_(work.source)

    def leave_alike(directions: Any, sources: Any, targets: Any) -> bool:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)
        return bool(add_alike(directions, sources, targets))

    alike: dict[str, Any] = {} if add_alike is None else {"add_alike": leave_alike}  # another checkout may have none
    with (
        patch.object(changes, "fused_backend", lambda *_: triton_backend),
        patch.multiple(triton_backend, add_kernel=Kernel(), table_kernel=Kernel(), _launch=leave, **alike),
    ):
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
    """Milliseconds per layer: a plain forward, a resident step, and a streamed step, and a resident one with kernels.

    The lowest of runs that take turns; without Triton the last one is NaN.
    """
    ids = torch.arange(LENGTH)[None]
    models = [model_of(layers) for _ in range(4)]
    resident, prepared = (ZeroOrder(model, lr=1e-9, brake=None) for model in models[1:3])
    streamed = ZeroOrder(models[3], lr=1e-9, brake=None, offload="cpu")
    prepared.directions.backend = "triton"
    kernels = without_launches if find_spec("triton") else without_noise

    def loss(model: nn.Module) -> Tensor:
        found: Tensor = model(input_ids=ids, labels=ids).loss
        return found

    def plain() -> None:
        with torch.no_grad():
            loss(models[0])

    def step(zo: ZeroOrder) -> None:
        with without_noise():
            zo.step(lambda: loss(zo.model))

    def with_kernels() -> None:
        with kernels():
            prepared.step(lambda: loss(prepared.model))

    runs: list[Callable[[], object]] = [plain, lambda: step(resident), lambda: step(streamed), with_kernels]
    try:
        for run in runs * 3:  # the first steps look closely
            run()
        found = [[processor_time(run) for run in runs] for _ in range(repeats)]
    finally:
        streamed.close()
    lowest = [1e3 * min(column) / layers for column in zip(*found, strict=True)]
    return lowest if kernels is without_launches else [*lowest[:3], math.nan]


def numbers_of(plain: float, resident: float, streamed: float, kernels: float) -> list[str]:
    """The cells of a row, for two probes per step."""
    numbers = plain, resident / 2 - plain, (streamed - resident) / 2, (kernels - resident) / 2, resident, streamed
    return [f"{number:.3f}" for number in numbers]


def row(layers: int, repeats: int) -> list[str]:
    """A row of the table; "handing over" and "kernels" are what such a step takes beyond a resident one."""
    with at_once():
        return [str(layers), *numbers_of(*times(layers, repeats))]


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
        plain, _, _, kernels, resident, streamed = map(min, zip(*runs, strict=True))
        rows.append([f"{layers}, {name}", *numbers_of(plain, resident, streamed, resident + 2 * kernels)])
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
