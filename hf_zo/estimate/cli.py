"""The command ``zo-estimate``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from zo_core import ZOConfig, ZOError
from zo_core.sizes import parse_number

from .picture import as_bars, save_plot
from .plan import Workload, estimate
from .rates import Rates, measure_rates
from .skeleton import skeleton
from .table import as_json, as_table
from .variants import LORA_TARGETS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the estimate; returns the exit status: 0, or 2 for an error."""
    args = _parser().parse_args(argv)
    try:
        config = ZOConfig(
            estimator=args.estimator,
            num_probes=args.num_probes,
            rule=args.rule,
            backprop=args.backprop,
            blocks=tuple(args.blocks) if args.blocks else None,
            offload=None if args.device_memory is None else "auto",
            device_memory=args.device_memory,
        )
        dtype = DTYPES[args.dtype]
        model = skeleton(args.model, dtype)
        measured = measure_rates(torch.device(args.device), dtype, args.folder) if args.measure else Rates()
        rates = Rates(args.link or measured.link, args.disk or measured.disk, args.flops or measured.flops)
        work = Workload(
            args.batch_size,
            args.length,
            args.device,
            config,
            rates,
            args.lora_rank,
            tuple(name.strip() for name in args.lora_targets.split(",")),
        )
        rows = estimate(model, work)
        count = sum(p.numel() for p in model.parameters())
        title = (
            f"{args.model}\n{type(model).__name__}, {count:,} parameters in {args.dtype}; "
            f"batches of {work.tokens:,} tokens"
        )
        print(as_json(args.model, rows, work) if args.json else f"{as_table(title, rows, work)}\n\n{as_bars(rows)}")
        if args.plot is not None:
            save_plot(rows, title, args.plot)
    except ZOError as error:
        print(f"zo-estimate: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zo-estimate",
        description="Estimates what it takes to fine-tune a model with only forward passes, from its configuration.",
    )
    parser.add_argument("model", help="a folder with a config.json, or the name of a model on the Hub")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16", help="dtype of the weights (bfloat16)")
    parser.add_argument("--batch-size", type=int, default=1, help="sequences per batch (1)")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence (512)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="where the model computes (cuda)")
    parser.add_argument("--device-memory", help=ZOConfig.help_for("device_memory"))
    parser.add_argument("--blocks", nargs="+", help=ZOConfig.help_for("blocks"))
    parser.add_argument("--estimator", default="spsa", help=ZOConfig.help_for("estimator"))
    parser.add_argument("--num-probes", type=int, help=ZOConfig.help_for("num_probes"))
    parser.add_argument("--rule", default="auto", help=ZOConfig.help_for("rule"))
    parser.add_argument("--backprop", nargs="+", help=ZOConfig.help_for("backprop"))
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--lora-targets", default=",".join(LORA_TARGETS), help="names of the layers with adapters")
    parser.add_argument("--link", type=_rate, help="bytes per second between host and device, for example 25G")
    parser.add_argument("--disk", type=_rate, help="bytes per second of the disk, for example 3G")
    parser.add_argument("--flops", type=_rate, help="operations per second of the device, for example 100T")
    parser.add_argument("--measure", action="store_true", help="measure the rates that are not given, on this machine")
    parser.add_argument("--folder", help="for --measure: a folder on the disk for the blocks")
    parser.add_argument("--json", action="store_true", help="print all numbers as JSON, in bytes and seconds")
    parser.add_argument("--plot", metavar="FILE", help="also draw the bars into FILE.png, .svg or .pdf (matplotlib)")
    return parser


def _rate(text: str) -> float:
    try:
        return parse_number(text.removesuffix("/s"))
    except ValueError:
        message = f"{text!r} must be a number above 0, optionally followed by K, M, G, T or P"
        raise argparse.ArgumentTypeError(message) from None
