"""Seed logs on the command line.

    zo-seedlog show run/seedlog.zo [--plot run.png | run.html]
    zo-seedlog verify run/seedlog.zo [--base model.safetensors]
    zo-seedlog replay run/seedlog.zo --base model.safetensors --out trained.safetensors [--until 500]

``python -m zo_core.seedlog`` is the same command. A base is a safetensors file, or a folder of them.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ..curves import Curves
from ..errors import StateError, ZOError
from ..files import replacing, write_whole
from ..report import page, save_picture
from .header import check_run
from .log import SeedLog
from .replay import engine_for, moved_names, replay

WIDTH, HEIGHT = 72, 12
#: What a log has of each direction: the number that the update multiplies it by.
GRADIENT = "Coefficient, summed over the directions"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0 on success, 1 if the log is damaged or does not fit the base."""
    parser = argparse.ArgumentParser(prog="zo-seedlog", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "show": "summarise a log: the run, its losses, its projected gradients",
        "verify": "check every record, and with --base also the model that the run started from",
        "replay": "compute the trained weights from the base model and the log",
    }
    for name, text in helps.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("log", type=Path)
        if name == "show":
            drawn = (
                "also draw loss, projected gradient and learning rate: as one page in FILE.html, or as a picture in "
            )
            drawn += "FILE.png, .svg or .pdf, which needs matplotlib"
            command.add_argument("--plot", "--png", type=Path, metavar="FILE", help=drawn)
        else:
            command.add_argument("--base", type=Path, required=name == "replay", help="safetensors file, or a folder")
        if name == "replay":
            command.add_argument("--out", type=Path, required=True, help="the safetensors file to write")
            command.add_argument("--until", type=int, help="how many steps the run had taken; default: all")
    options = parser.parse_args(arguments)
    try:
        return {"show": _show, "verify": _verify, "replay": _replay}[options.command](options)
    except ZOError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _show(options: argparse.Namespace) -> int:
    log = SeedLog.read(options.log)
    width = shutil.get_terminal_size().columns
    wrapper = textwrap.TextWrapper(width, subsequent_indent=" " * 13, break_long_words=False, break_on_hyphens=False)
    print("\n".join([*map(wrapper.fill, summary(log)), "", *curve([entry.loss for entry in log.steps])]))
    if options.plot is not None:
        _draw(log, options.plot)
    return 0 if log.corrupt is None else 1


def _verify(options: argparse.Namespace) -> int:
    log = SeedLog.read(options.log)
    if log.corrupt is not None:
        raise StateError(log.corrupt)
    if options.base is not None:
        model, _ = _model(options.base, log)
        check_run(engine_for(model, log), log, log.first_step, frozen=False)
        print(f"{options.base} is the model that the run started from")
    torn = f"; {log.torn} bytes of an unfinished record at the end are left out" if log.torn else ""
    print(f"{log.path} is whole: steps {log.first_step} to {log.next_step - 1}, every checksum right{torn}")
    return 0


def _replay(options: argparse.Namespace) -> int:
    log = SeedLog.read(options.log)
    model, others = _model(options.base, log)
    step = replay(model, log, options.until, frozen=False)
    tensors = {name: tensor.detach().contiguous() for name, tensor in (others | model.state_dict()).items()}
    with replacing(options.out) as fresh:
        save_file(tensors, fresh, metadata={"format": "pt"})
    print(f"{options.out} has the weights at step {step}")
    return 0


def summary(log: SeedLog) -> list[str]:
    """Summarises a log in lines of text."""
    header, moved = log.header, [entry for entry in log.steps if not entry.skipped]
    slots = header["base"]["slots"]
    count = sum(math.prod(shape) for shape, _, _ in slots.values())
    lines = [
        f"{log.path}: {log.path.stat().st_size:,} bytes, steps {log.first_step} to {log.next_step - 1}",
        f"base model   {count:,} trained parameters in {len(slots)} tensors, {header['base']['frozen'][0]} frozen "
        f"tensors, fingerprint {header['base']['digest']}",
        f"method       estimator {header['estimator']}, {header['num_probes']} directions, noise {header['noise']}, "
        f"rule {header['rule']}, target {header['target']}, eps {header['eps']:g}, clip {header['clip']}",
        f"made by      zo-trainer {header['zo']}, torch {header['torch']}",
        f"steps        {len(log.steps):,}, of which {len(log.steps) - len(moved):,} skipped; "
        f"{log.parsed.changes} change-records",
    ]
    lines += [f"note         {note}" for note in (*header["limits"], *header["notes"])]
    for entry in log.steps:
        if entry.rollback is not None:
            lines.append(
                f"rollback     at step {entry.step}, whose loss was {entry.loss:.4g}, to before step "
                f"{entry.rollback.to}; learning rates times {entry.rollback.factor:g} from there on"
            )
    if log.steps:
        rates = [entry.lrs[0] for entry in log.steps]
        lines.append(f"lr           {rates[0]:g} first, {rates[-1]:g} last, {max(rates):g} highest")
    if moved:
        grads = [math.fsum(entry.coefficients) for entry in moved]
        mean = math.fsum(grads) / len(grads)
        square = math.sqrt(math.fsum(g * g for g in grads) / len(grads))
        lines.append(
            f"coefficients {mean:.4g} mean, {square:.4g} root mean square, {min(grads):.4g} to {max(grads):.4g} "
            "(summed over the directions: for spsa the projected gradient as it was applied)"
        )
    scored = [entry.scores for entry in log.steps if entry.scores is not None]
    if scored:
        means = [scores.mean for scores in scored]
        lines.append(
            f"scores       {means[0]:.4g} mean of the first step, {means[-1]:.4g} of the last, "
            f"{min(s.min for s in scored):.4g} to {max(s.max for s in scored):.4g} in all"
        )
    if log.torn:
        lines.append(f"torn         {log.torn} bytes of an unfinished record at the end are left out")
    if log.corrupt is not None:
        lines.append(f"corrupt      {log.corrupt}")
    return lines


def curve(losses: Sequence[float]) -> list[str]:
    """Plots losses as lines of text: each column has one dot, the mean of some consecutive steps."""
    columns = min(WIDTH, len(losses))
    edges = [len(losses) * i // columns for i in range(columns + 1)] if columns else [0]
    means = []
    for start, stop in itertools.pairwise(edges):
        finite = [loss for loss in losses[start:stop] if math.isfinite(loss)]
        means.append(math.fsum(finite) / len(finite) if finite else math.nan)
    known = [mean for mean in means if math.isfinite(mean)]
    if not known:
        return ["no finite losses"]
    low, high = min(known), max(known)
    rows = [[" "] * columns for _ in range(HEIGHT)]
    for column, mean in enumerate(means):
        if math.isfinite(mean):
            share = (mean - low) / (high - low) if high > low else 0.0
            rows[round((1 - share) * (HEIGHT - 1))][column] = "•"
    labels = {0: f"{high:10.4f}", HEIGHT - 1: f"{low:10.4f}"}
    return [f"{labels.get(row, ''):>10} ┤{''.join(cells)}" for row, cells in enumerate(rows)]


def _draw(log: SeedLog, path: Path) -> None:
    curves = Curves()
    for entry in log.steps:
        grad = math.fsum(entry.coefficients) if entry.coefficients else math.nan
        curves.add(entry.step, entry.loss, grad, entry.lrs[0], entry.why)
    if path.suffix.lower() in (".html", ".htm"):
        facts = dict(re.split(r"  +", line, maxsplit=1) for line in summary(log)[1:] if "  " in line)
        write_whole(path, page(str(log.path), facts, curves, gradient=GRADIENT).encode())
    else:
        save_picture(path, log.path.name, curves, gradient=GRADIENT)
    print(f"{path} has the curves")


def _model(base: Path, log: SeedLog) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A module with those tensors of safetensors files that the run moved, and all others by name.

    The others may have names that no module allows: "q.weight.absmax" next to "q.weight", in 4-bit checkpoints.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(base.glob("*.safetensors")) if base.is_dir() else [base]:
        try:
            with safe_open(path, framework="pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception as error:  # safetensors has its own error type
            raise StateError(f"the base {path} cannot be read: {error}") from error
    moved = moved_names(tensors, log.header)
    if not moved:
        keys = list(log.header["base"]["slots"])
        raise StateError(
            f"none of the {len(keys)} tensors that {log.path} trained is in {base}; it has to hold "
            f"{', '.join(log.header['prefix'] + key for key in keys[:3])} …"
        )
    model = nn.Module()
    for name in [name for name in tensors if name in moved]:
        _register(model, name, tensors.pop(name))
    return model, tensors


def _register(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    *path, last = name.split(".")
    module = model
    for part in path:
        child = module._modules.get(part)
        if child is None:
            child = nn.Module()
            module.add_module(part, child)
        module = child
    module.register_parameter(last, nn.Parameter(tensor))


if __name__ == "__main__":
    sys.exit(main())
