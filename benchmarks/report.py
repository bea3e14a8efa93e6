"""Results as a Markdown table and as JSON, with hardware, date and command."""

from __future__ import annotations

import json
import platform
import sys
from datetime import date
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def hardware(device: torch.device) -> str:
    """What the numbers were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' if threads > 1 else ''} of {model}"


def save(
    name: str,
    title: str,
    columns: list[str],
    rows: list[list[str]],
    device: torch.device,
    *,
    write: bool,
    show: bool = True,
) -> None:
    """Prints a table, unless ``show`` is False; with ``write``, saves it as Markdown and JSON in benchmarks/results."""
    command = "python -m " + " ".join([f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    facts = {
        "title": title,
        "hardware": hardware(device),
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "command": command,
    }
    table = markdown(columns, rows)
    if show:
        print(f"{title}\n{facts['hardware']}, torch {facts['torch']}\n{table}")
    if write:
        RESULTS.mkdir(exist_ok=True)
        stem = f"{name}-{device.type}-{facts['date']}"
        about = f"{facts['hardware']}, torch {facts['torch']}, {facts['date']}: `{command}`"
        (RESULTS / f"{stem}.md").write_text(f"# {title}\n\n{about}\n\n{table}\n")
        (RESULTS / f"{stem}.json").write_text(json.dumps({**facts, "columns": columns, "rows": rows}, indent=1) + "\n")


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def saved(name: str, device: torch.device) -> list[list[str]]:
    """The rows that `save` wrote last under this name; none if it never did."""
    found = sorted(RESULTS.glob(f"{name}-{device.type}-????-??-??.json"))
    return json.loads(found[-1].read_text())["rows"] if found else []
