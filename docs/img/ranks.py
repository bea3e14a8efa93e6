"""Draws ranks.svg: what two processes measure in a step in each of the three modes, and what they exchange.

python docs/img/ranks.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

PROBE, EXCHANGE, UPDATE = "#5b9e6f", "#c9b458", "#b58cc2"
#: For each mode, what ranks 0 and 1 measure one after another, and the update of both.
MODES = {
    "directions": ([["θ + εz₁ on A", "θ − εz₁ on A"], ["θ + εz₂ on B", "θ − εz₂ on B"]], "along z₁, z₂"),
    "data": ([["θ + εz₁ on A", "θ − εz₁ on A"], ["θ + εz₁ on B", "θ − εz₁ on B"]], "along z₁"),
    "points": ([["θ + εz₁ on A"], ["θ − εz₁ on A"]], "along z₁"),
}


def main() -> None:
    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "ranks"  # the same file every time
    figure, axes = plt.subplots(3, 1, figsize=(9.2, 4.2), sharex=True)
    for place, (mode, (measured, said)) in zip(axes, MODES.items(), strict=True):
        steps = len(measured[0])
        for row, rank in ((1, 0), (0, 1)):
            for index, text in enumerate(measured[rank]):
                bar(place, row, 2.0 * index, 1.9, text, PROBE)
            bar(place, row, 2.0 * steps + 0.5, 1.9, said, UPDATE)
        place.broken_barh([(2.0 * steps, 0.4)], (-0.3, 1.6), color=EXCHANGE)
        place.set_yticks(range(2), ("rank 1", "rank 0"))
        place.set_ylabel(mode, rotation=0, ha="right", va="center", labelpad=12, fontweight="bold")
        place.set_ylim(-0.5, 1.5)
        place.set_xlim(-0.1, 7.0)
        place.set_xticks([])
        place.tick_params(length=0)
        for side in ("top", "right", "left", "bottom"):
            place.spines[side].set_visible(False)
    axes[-1].set_xlabel(
        "time. Green: a forward on a batch, A or B. Yellow: the losses are exchanged, 8 bytes each.\n"
        "Violet: every process computes the same update, from the same numbers"
    )
    figure.tight_layout()
    figure.savefig(Path(__file__).parent / "ranks.svg", metadata={"Date": None})


def bar(axes: plt.Axes, row: int, begin: float, length: float, text: str, colour: str) -> None:
    axes.broken_barh([(begin, length)], (row - 0.3, 0.6), color=colour)
    axes.text(begin + length / 2, row, text, ha="center", va="center", fontsize=9)


if __name__ == "__main__":
    main()
