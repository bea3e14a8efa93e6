"""Plots of what is in ``benchmarks/results``: the newest result of each kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from .report import RESULTS

IN_DOCS = Path(__file__).parent.parent / "docs" / "img"

COLOURS = ["#4053d3", "#ddb310", "#b51d14", "#00beff", "#00b25d", "#cacaca"]


def newest(stem: str) -> dict[str, Any] | None:
    """The newest result whose file name begins with ``stem``."""
    found = sorted(RESULTS.glob(f"{stem}*.json"), key=lambda path: path.stem[-10:])
    return json.loads(found[-1].read_text()) if found else None


def finish(figure: Any, axes: Any, result: dict[str, Any], name: str, folder: Path = RESULTS) -> Path:
    """Writes a figure, with the hardware that it was measured on below it."""
    axes.spines[["top", "right"]].set_visible(False)
    figure.text(
        0.01, 0.01, f"{result['hardware']}, torch {result['torch']}, {result['date']}", fontsize=7, color="#555"
    )
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def loss() -> Path | None:
    """Loss against forwards."""
    result = newest("loss-curves")
    if result is None:
        return None
    figure, axes = plt.subplots(figsize=(7, 3.4))
    forwards = [int(row[0]) for row in result["rows"]]
    for index, name in enumerate(result["columns"][1:]):
        values = [float(row[index + 1]) for row in result["rows"]]
        axes.plot(forwards, values, color=COLOURS[index], label=name)
    axes.set_yscale("log")
    axes.set_xlabel("forwards (each backward pass comes on top)")
    axes.set_ylabel("held-out loss")
    axes.legend(frameon=False, fontsize=8)
    return finish(figure, axes, result, "loss")


def memory_over_steps() -> Path | None:
    """Memory of a process over many steps."""
    result = newest("memory-over-steps-base")
    if result is None:
        return None
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
    return finish(figure, axes, result, "memory-over-steps", IN_DOCS)


def draw() -> list[Path]:
    """Draws all plots for which there are results."""
    return [path for path in (loss(), memory_over_steps()) if path is not None]
