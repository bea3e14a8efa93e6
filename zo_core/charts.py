"""Charts as SVG text: no package is needed, and the colours are those of the page that they are in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 640, 220
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 28

Points = Sequence[tuple[float, float]]


def line_chart(points: Points, label: str, *, log: bool = False) -> str:
    """A line through points, over a horizontal axis of steps.

    Args:
        points: in order; all numbers finite.
        label: what it shows, for people who cannot see it.
        log: whether the vertical axis is logarithmic; points that are not above 0 are then left out.
    """
    points = [(x, math.log10(y)) for x, y in points if y > 0] if log else list(points)
    if not points:
        return f"<p>{escape(label)}: nothing to show</p>"
    (x0, x1), (y0, y1) = _range([x for x, _ in points]), _range([y for _, y in points], 0.05)

    def place(x: float, y: float) -> tuple[float, float]:
        right, up = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return LEFT + right * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [_open(HEIGHT, label)]
    for tick in _ticks(y0, y1, whole=log):
        _, y = place(x0, tick)
        text = f"1e{tick:g}" if log else f"{tick:.4g}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for tick in _ticks(x0, x1):
        x, _ = place(tick, y0)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{tick:,.10g}</text>')
    places = [place(x, y) for x, y in points]
    if len(places) == 1:
        parts.append(f'<circle class="dot" cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3"/>')
    parts.append(f'<polyline class="line" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>')
    return "".join([*parts, "</svg>"])


def bar_chart(bars: Sequence[tuple[str, float, str]], label: str) -> str:
    """Horizontal bars, each with a name, a length of at least 0, and a text beside it."""
    row, most = 26, max((value for _, value, _ in bars), default=0.0) or 1.0
    begin, room = 150, WIDTH - 150 - 150
    parts = [_open(row * len(bars), label)]
    for index, (name, value, text) in enumerate(bars):
        y = row * index
        length = room * value / most
        parts.append(f'<text x="{begin - 8}" y="{y + 17}" text-anchor="end">{escape(name)}</text>')
        parts.append(f'<rect class="bar" x="{begin}" y="{y + 4}" width="{length:.1f}" height="{row - 8}" rx="2"/>')
        parts.append(f'<text x="{begin + length + 8:.1f}" y="{y + 17}">{escape(text)}</text>')
    return "".join([*parts, "</svg>"])


def _open(height: int, label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">'


def _range(values: Sequence[float], margin: float = 0.0) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        width = abs(low) * 0.1 or 1.0
        return low - width, high + width
    return low - margin * (high - low), high + margin * (high - low)


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Some four round numbers in a range."""
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
    if whole and high - low > 1:
        step = max(1.0, round(step))
    first = math.ceil(low / step)
    return [index * step for index in range(first, math.floor(high / step) + 1)]
