"""Draws an estimate: as bars of text, and as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence

from zo_core import ConfigError
from zo_core.sizes import human

from .plan import Row

#: Width of the names and of the bars.
NAMES, BARS = 31, 49
#: The places, with the character and the colour of their bars.
PLACES = (("device", "█", "#2f6fde"), ("host", "▒", "#8fb3f2"), ("disk", "·", "#b8bfca"))


def as_bars(rows: Sequence[Row]) -> str:
    """Draws the rows as bars of at most 80 columns; those that do not fit beside forward-only training end in ``>``."""
    own = [row for row in rows if row.forwards is not None] or rows
    longest = max(sum(_sizes(row)) for row in own)
    unit = longest / (BARS - 1)
    signs = "  ".join(f"{sign} {name}" for name, sign, _ in PLACES)
    lines = [f"{signs}  (each is {human(int(unit))})"]
    for row in rows:
        lengths, end = list[int](), 0.0
        for size in _sizes(row):
            end += size / unit
            lengths.append(max(round(end) - sum(lengths), 1 if size else 0))
        if sum(_sizes(row)) <= longest:  # what is too small for a sign of its own has one of the largest place
            lengths[lengths.index(max(lengths))] -= max(sum(lengths) - BARS, 0)
        bar = "".join(sign * length for (_, sign, _), length in zip(PLACES, lengths, strict=True))
        bar = bar if len(bar) <= BARS else bar[: BARS - 1] + ">"
        lines.append(f"{row.name:{NAMES}}{bar}".rstrip())
    return "\n".join(lines)


def save_plot(rows: Sequence[Row], title: str, path: str | os.PathLike[str]) -> None:
    """Draws the rows as a picture, with matplotlib.

    Args:
        rows: the rows.
        title: heading of the picture.
        path: the file; its ending decides the format.

    Raises:
        ConfigError: matplotlib is not installed, or cannot write such a file.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        message = f"--plot {path} needs the package matplotlib; pip install 'zo-trainer[plot]', or leave --plot out"
        raise ConfigError([message]) from None
    figure = Figure(figsize=(9, 0.5 + 0.35 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = [row.name for row in rows]
    begin = [0.0] * len(rows)
    for index, (place, _, colour) in enumerate(PLACES):
        sizes = [_sizes(row)[index] / 1e9 for row in rows]
        axes.barh(names, sizes, left=begin, label=place, color=colour)
        begin = [left + size for left, size in zip(begin, sizes, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("GB")
    axes.set_title(title, fontsize=10)
    axes.legend()
    try:
        figure.savefig(path)
    except (ValueError, OSError) as error:
        raise ConfigError([f"--plot {path} cannot be drawn: {error}"]) from error


def _sizes(row: Row) -> tuple[int, int, int]:
    return row.device, row.host, row.disk
