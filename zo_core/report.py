"""A run on one page: HTML that holds everything it needs, to open in any browser, to send, or to keep."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

from .charts import bar_chart, line_chart
from .curves import Curves
from .errors import StateError

#: Where the largest gradient is this many times the smallest one, the axis is logarithmic.
WIDE = 30.0

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --dim: #667085; --grid: #e3e7ed; --line: #2f6fde; --back: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --dim: #98a2b3; --grid: #2c3543; --line: #7aa7ff; --back: #151a21; }
}
body { margin: 0 auto; max-width: 46rem; padding: 1rem; background: var(--back); color: var(--ink);
       font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: .5rem 0; } h2 { font-size: 1rem; margin: 1.6rem 0 .3rem; }
p, td, th { color: var(--ink); } small { color: var(--dim); }
table { border-collapse: collapse; width: 100%; }
th { font-weight: normal; text-align: left; color: var(--dim); width: 12rem; }
td, th { padding: .15rem .5rem .15rem 0; vertical-align: top; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; } svg text { fill: var(--dim); font-size: 12px; }
.grid { stroke: var(--grid); } .bar, .dot { fill: var(--line); }
.line { fill: none; stroke: var(--line); stroke-width: 1.5; }
"""


def page(title: str, facts: Mapping[str, str], curves: Curves, *, gradient: str = "Projected gradient") -> str:
    """A page about a run.

    Args:
        title: heading of the page.
        facts: rows of the table at the top, as plain text.
        curves: the run.
        gradient: name of the curve of projected gradients.
    """
    losses, grads, lrs = curves.losses(), curves.grads(), curves.lrs()
    sizes = [size for _, size in grads if size > 0]
    wide = bool(sizes) and max(sizes) > WIDE * min(sizes)
    each = "" if curves.width == 1 else f" <small>each point is {curves.width} steps</small>"
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        _table({**facts, **_results(curves)}),
        f"<h2>Loss{each}</h2>",
        line_chart(losses, "mean loss by step"),
        f"<h2>{escape(gradient)} <small>root mean square</small></h2>",
        line_chart(grads, f"{gradient} by step", log=wide),
        "<h2>Learning rate</h2>",
        line_chart(lrs, "learning rate by step"),
    ]
    if memory := curves.memory():
        parts += ["<h2>Memory <small>MiB</small></h2>", line_chart(memory, "memory in MiB by step")]
    if curves.clock.total:
        parts += ["<h2>Where the time went</h2>", _times(curves)]
    if curves.events:
        more = sum(curves.reasons.values()) - len(curves.events)
        rows = {f"step {step:,}": reason for step, reason in curves.events}
        parts += ["<h2>Steps that moved nothing</h2>", _table(rows), f"<p>and {more:,} more</p>" if more else ""]
    return "\n".join([*parts, "</body></html>", ""])


def save_picture(path: Path, title: str, curves: Curves, *, gradient: str = "Projected gradient") -> None:
    """Draws loss, projected gradient and learning rate below each other, with matplotlib.

    Args:
        path: the file; its ending decides the format.
        title: heading of the picture.
        curves: the run.
        gradient: name of the curve of projected gradients.

    Raises:
        StateError: matplotlib is not installed, or cannot write such a file.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise StateError(
            f"drawing {path} needs the package matplotlib; pip install 'zo-trainer[plot]', or name a file that ends in "
            ".html, which needs nothing"
        ) from None
    figure = Figure(figsize=(8, 7), layout="constrained")
    shown = ("loss", curves.losses()), (gradient.lower(), curves.grads()), ("learning rate", curves.lrs())
    for axes, (name, points) in zip(figure.subplots(len(shown), sharex=True), shown, strict=True):
        axes.plot([x for x, _ in points], [y for _, y in points], linewidth=1, marker="." if len(points) == 1 else "")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    figure.axes[0].set_title(title)
    figure.axes[-1].set_xlabel("step")
    try:
        figure.savefig(path)
    except (ValueError, OSError) as error:
        raise StateError(f"{path} cannot be drawn: {error}") from error


def _results(curves: Curves) -> dict[str, str]:
    losses, clock = curves.losses(), curves.clock
    found = {"steps": f"{curves.steps:,}, of which {curves.skipped:,} moved nothing"}
    if losses:
        tenth = max(1, len(losses) // 10)
        begin, end = (sum(loss for _, loss in part) / tenth for part in (losses[:tenth], losses[-tenth:]))
        found["loss on the batches"] = f"{begin:.4g} in the first tenth, {end:.4g} in the last"
    if clock.total:
        measuring = clock.seconds["forwards"] or clock.total
        found["time"] = f"{_duration(clock.total)} from the first step to the last"
        found["forwards"] = (
            f"{clock.forwards:,} by this process, {clock.forwards / measuring:,.3g} per second of measuring"
        )
    return found


def _times(curves: Curves) -> str:
    clock = curves.clock
    rows = [("forwards", clock.seconds["forwards"]), ("updates", clock.seconds["updates"])]
    rows.append(("everything else", max(0.0, clock.total - sum(seconds for _, seconds in rows))))
    bars = [(name, s, f"{_duration(s)} ({s / clock.total:.0%})") for name, s in rows]
    note = "Forwards include perturbing the weights; everything else is data, logging, evaluation and checkpoints."
    return f"{bar_chart(bars, 'where the time went')}<p><small>{note}</small></p>"


def _table(rows: Mapping[str, str]) -> str:
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows.items())
    return f"<table>{cells}</table>"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
