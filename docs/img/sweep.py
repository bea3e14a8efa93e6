"""Draws sweep.svg: what happens when, while two probes go through a streamed model.

python docs/img/sweep.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

ROWS = ("write back", "probe θ − εz", "probe θ + εz", "update", "fetch")
COLOURS = ("#8da9c4", "#e0795b", "#5b9e6f", "#b58cc2", "#c9b458")


def main() -> None:
    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "sweep"  # the same file every time
    figure, axes = plt.subplots(figsize=(9.2, 3.1))
    for block in range(4):
        start = 3.0 * block
        for row, begin, length in (
            (4, start - 2.6, 2.3),
            (3, start, 0.5),
            (2, start + 0.5, 1.2),
            (1, start + 1.75, 1.2),
        ):
            bar(axes, row, begin, length, block)
        bar(axes, 0, start + 0.55, 2.1, block)
    axes.annotate(
        "hands over", (1.72, 1.3), (3.2, 1.47), fontsize=8, va="center", arrowprops={"arrowstyle": "->", "lw": 0.8}
    )
    axes.set_yticks(range(5), ROWS)
    axes.set_ylim(-0.5, 4.6)
    axes.set_xlim(-2.8, 12.2)
    axes.set_xticks([])
    axes.set_xlabel(
        "time: each block is fetched once, the update of the last step is applied as it passes,\n"
        "both probes run through it, and the next block is read meanwhile"
    )
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)
    figure.tight_layout()
    folder = Path(__file__).parent
    figure.savefig(folder / "sweep.svg", metadata={"Date": None})


def bar(axes: plt.Axes, row: int, begin: float, length: float, block: int) -> None:
    axes.broken_barh([(begin, length)], (row - 0.3, 0.6), color=COLOURS[row])
    axes.text(begin + length / 2, row, str(block + 1), ha="center", va="center", fontsize=9)


if __name__ == "__main__":
    main()
