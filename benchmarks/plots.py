"""Plots of what is in ``benchmarks/results``: the newest result of each name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import torch

from .report import RESULTS, saved

IN_DOCS = Path(__file__).parent.parent / "docs" / "img"

COLOURS = ["#4053d3", "#ddb310", "#b51d14", "#00beff", "#00b25d", "#cacaca"]

#: Tasks and ways of the plot of what is learnt from forwards.
LEARNT = ["domain", "verbalizer", "classify", "vit", "nf4"]
FORWARD_ONLY = ["mezo", "activations", "activations-one-sided-small", "vectors-one-sided-small", "one-sided-small"]


def newest(stem: str) -> dict[str, Any]:
    """The newest result of this name that was measured on a CPU."""
    found = sorted(RESULTS.glob(f"{stem}-cpu-????-??-??.json"))
    result: dict[str, Any] = json.loads(found[-1].read_text())
    return result


def finish(figure: Any, axes: Any, result: dict[str, Any], name: str) -> Path:
    """Writes a figure, with the hardware that it was measured on below it."""
    axes.spines[["top", "right"]].set_visible(False)
    figure.text(
        0.01, 0.01, f"{result['hardware']}, torch {result['torch']}, {result['date']}", fontsize=7, color="#555"
    )
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    path = IN_DOCS / f"{name}.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def memory_over_steps() -> Path:
    """Memory of a process over many steps."""
    result = newest("memory-over-steps-base")
    figure, axes = plt.subplots(figsize=(7, 3.4))
    rows = [row for row in result["rows"] if row[0].isdigit()]
    for index, name in enumerate(result["columns"][1:]):
        points = [(int(row[0]), float(row[index + 1])) for row in rows if row[index + 1]]
        style = "-" if name.startswith("llama") else "--"
        axes.plot(*zip(*points, strict=True), style, color=COLOURS[index % 3], label=name)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("MB above the imports")
    axes.set_title(result["title"].split(";")[1].strip(), fontsize=8)
    axes.legend(frameon=False, fontsize=8)
    return finish(figure, axes, result, "memory-over-steps")


def draw() -> list[Path]:
    """Draws the plots of the documentation from what is in ``benchmarks/results``."""
    from . import forwards_to_target, rivals

    curves = forwards_to_target.known_from(saved("forwards-to-target", torch.device("cpu")))
    learnt = forwards_to_target.plot(curves, LEARNT, FORWARD_ONLY, 240)
    return [memory_over_steps(), learnt, rivals.plot("verbalizer")]
