"""The host's part of a step: hooks and the function mode of a probe, and handing over between streamed probes.

On a GPU this Python runs beside the kernels, and decides the time of a step for models of up to a few billion
parameters. It needs no GPU to be measured: the passes over the weights are replaced by nothing, and the model's own
forward is measured and subtracted.

    python -m benchmarks.host_overhead                     # 12, 24 and 48 layers
    python -m benchmarks.host_overhead --layers 24 --save
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from zo_core import ZeroOrder
from zo_core.noise import Direction

from .report import save
from .timing import timed

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


def times(layers: int, repeats: int) -> list[float]:
    """Milliseconds per layer: a plain forward, a resident step, and a streamed step (medians, interleaved)."""
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
        found = [[timed(run, CPU) for run in runs] for _ in range(repeats)]
    finally:
        streamed.close()
    return [1e3 * statistics.median(column) / layers for column in zip(*found, strict=True)]


def row(layers: int, repeats: int) -> list[str]:
    """A row of the table: two probes per step; "handing over" is what a streamed step takes beyond a resident one."""
    with without_noise():
        plain, resident, streamed = times(layers, repeats)
    numbers = plain, resident / 2 - plain, (streamed - resident) / 2, resident, streamed
    return [str(layers), *(f"{number:.3f}" for number in numbers)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 24, 48])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--save", action="store_true", help="write the table to benchmarks/results")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = [row(layers, args.repeats) for layers in args.layers]
    title = "The host's part of a step without noise, in ms per layer (and per probe in the second and third column)"
    save("host-overhead", title, COLUMNS, rows, CPU, write=args.save)


if __name__ == "__main__":
    main()
