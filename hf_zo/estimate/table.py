"""Formats an estimate as a table or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from zo_core.sizes import human

from .plan import Row, Workload


def as_table(title: str, rows: Sequence[Row], work: Workload) -> str:
    """Formats the rows as a table of at most 80 columns."""
    head = f"{'':30}{'device':>10}{'host':>10}{'disk':>10}{'a step':>11}{'s/step':>9}"
    lines = [title, "", head]
    for row in rows:
        moved = row.read + row.written
        seconds = "" if row.seconds is None else f">={row.seconds:.2g}"
        cells = [_cell(row.device), _cell(row.host), _cell(row.disk)]
        lines.append(f"{row.name:30}{cells[0]:>10}{cells[1]:>10}{cells[2]:>10}{_cell(moved):>11}{seconds:>9}")
    lines += ["", *_notes(rows, work)]
    return "\n".join(line.rstrip() for line in lines)


def _cell(size: int) -> str:
    return human(size) if size else "-"


def _notes(rows: Sequence[Row], work: Workload) -> list[str]:
    notes = ["'A step' is what is read and written per step between device, host and disk."]
    if work.device == "cpu":
        notes.append("On a CPU, device and host are the same memory: add them up. What glibc keeps of")
        notes.append("freed memory is on top, unless MALLOC_MMAP_THRESHOLD_=65536 is set.")
    else:
        notes.append("A CUDA context and the workspaces of libraries come on top of 'device'.")
    if work.config.backprop:
        notes.append(f"Backprop in {', '.join(work.config.backprop)} is included"[:79] + ",")
        notes.append("in float32 or bfloat16 as the weights are: a forward more, gradients, AdamW.")
    notes.append("Backprop is 16 bytes per trained parameter, the frozen weights, and activations.")
    if not all(row.traced for row in rows):
        notes.append("This model's forward does not run without values: activations are a formula, and")
        notes.append("those of backprop are missing.")
    if any(row.seconds is None and row.forwards for row in rows):
        notes.append("For the time of a step: --measure, or --flops, --link and --disk.")
    return notes


def as_json(title: str, rows: Sequence[Row], work: Workload) -> str:
    """Formats all numbers as JSON, in bytes and seconds."""
    inputs = {
        "batch_size": work.batch_size,
        "length": work.length,
        "device": work.device,
        "rates": asdict(work.rates),
        "config": work.config.to_dict(),
    }
    return json.dumps({"model": title, "workload": inputs, "rows": [asdict(row) for row in rows]}, indent=2)
