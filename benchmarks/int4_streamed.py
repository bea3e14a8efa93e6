"""How much time and memory does a step on the scales of a quantised, OPT-shaped model take on a GPU?

The layers' matrices are quantised on the device, by each library that is installed: to nf4 by bitsandbytes, resident
and streamed from host memory, and to int4 by torchao, resident (its weights cannot be streamed). A library that
is not there is named in a line, and is no failure.

    python -m benchmarks.int4_streamed --size 6.7b --layers 8 --save
"""

from __future__ import annotations

import argparse
import gc
import logging
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from zo_core import ZeroOrder

from .opt_streamed import SHAPES, median_seconds, opt, peak_gb
from .report import save


def to_nf4(model: nn.Module, device: torch.device) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or name == "lm_head":
            continue
        weight = linear.weight
        bias = linear.bias is not None
        layer = Linear4bit(
            linear.in_features, linear.out_features, bias=bias, compute_dtype=weight.dtype, device="meta"
        )
        layer.weight = Params4bit(weight.data, requires_grad=False, quant_type="nf4", module=layer)
        layer.bias = linear.bias
        model.set_submodule(name, layer.to(device))


def to_int4(model: nn.Module, device: torch.device) -> None:
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    scheme = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    quantize_(model, scheme, lambda module, name: isinstance(module, nn.Linear) and name != "lm_head")


#: How each library quantises a model, and whether the result can be streamed.
LIBRARIES: dict[str, tuple[Callable[[nn.Module, torch.device], None], bool]] = {
    "bitsandbytes": (to_nf4, True),
    "torchao": (to_int4, False),
}


def measure(library: str, device: torch.device, args: Any) -> list[list[str]]:
    """A row for every contender: name, seconds, as a multiple of two forwards, peak of device memory."""
    quantise, streams = LIBRARIES[library]
    model = opt(args.size, getattr(torch, args.dtype), device, args.layers)
    quantise(model, device)
    ids = torch.randint(0, model.config.vocab_size, (1, args.tokens), device=device)

    def loss() -> torch.Tensor:
        return model(input_ids=ids, labels=ids).loss

    @torch.no_grad()
    def two_forwards() -> float:
        return float(loss()) + float(loss())

    found: dict[str, tuple[float, float]] = {}

    def contend(name: str, run: Callable[[], object]) -> None:
        found[name] = median_seconds(run, args.rounds, device), peak_gb(run, device)

    contend("two forwards, resident", two_forwards)
    zo = ZeroOrder(model, lr=1e-4)
    if not any(slot.scaling is not None for slot in zo.slots):
        raise SystemExit(f"{library}: no scales are trained")
    contend("zo step, resident", lambda: zo.step(loss))
    zo.close()
    if streams:
        model.to("cpu")
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        streamed = ZeroOrder(model, lr=1e-4, offload="cpu", device=str(device))
        contend("zo step, streamed", lambda: streamed.step(loss))
        streamed.close("cpu")
    base = found["two forwards, resident"][0]
    return [
        [library, name, f"{seconds:.4f}", f"{seconds / base:.2f}", f"{peak:.2f}"]
        for name, (seconds, peak) in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SHAPES, default="6.7b")
    parser.add_argument("--layers", type=int, help="instead of the model's own number of layers")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    args = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    device = torch.device(args.device)
    rows = []
    for library in LIBRARIES:
        if find_spec(library) is None:
            print(f"{library} is not installed: its models are left out")
        else:
            rows += measure(library, device, args)
    if rows:
        save(
            f"int4-streamed-{args.size}-{args.dtype}",
            f"OPT-{args.size}, {args.layers or SHAPES[args.size][0]} layers in 4 bits, {args.tokens} tokens, "
            f"{args.dtype}; median of {args.rounds} steps on the scales",
            ["library", "", "seconds", "÷ two forwards", "peak device memory, GB"],
            rows,
            device,
            write=args.save,
        )


if __name__ == "__main__":
    main()
