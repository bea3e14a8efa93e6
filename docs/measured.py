"""Keeps the numbers in README and docs those of the files in benchmarks/results.

    python docs/measured.py             # rewrites the marked tables, and docs/benchmarks.md
    python docs/measured.py --check     # lists what is not current, and exits with 1

Two marks, each in a line of its own before a table (with an empty line between them):

    <!-- table RESULT -->              the rows are all rows of the result; they are rewritten
    <!-- from RESULT [RESULT ...] -->  the table was put together by hand; its numbers have to be in these results

RESULT is the name of a file in benchmarks/results without date and ending; the newest one counts.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BENCHMARKS = ROOT / "docs" / "benchmarks.md"

MARK = re.compile(r" *<!-- (table|from) ([\w.\- ]+?) -->")
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
#: Rows of a result that the page of all results shows.
SHOWN = 30

#: The parts of the page, and the results in each by how their names begin.
PARTS = {
    "Time of a step": ("step-overhead", "throughput", "host-overhead", "passes", "method-costs", "feature-reuse"),
    "Larger than the device or the memory": ("offload", "opt-streamed", "int4-streamed"),
    "Memory": ("shared-memory", "estimate", "memory-over-steps", "int4-memory", "hybrid-memory"),
    "Learning": ("learning", "low-rank-learning", "sparse-learning", "int4-learning", "hybrid-learning"),
    "Learning rates": ("first-run", "suggest-lr"),
    "More from a forward": ("directions", "basis-energy", "forwards-to-target", "per-second", "word-subspace"),
    "Beside other ways to train": ("rivals", "subspaces"),
    "Rewards": ("reward", "generation", "accuracy"),
    "Several processes": ("ranks",),
    "Replay": ("replay",),
    "Others": ("",),
}
HEAD = """# All results

    python -m benchmarks                    # measures everything again, and saves it
    python docs/measured.py                  # writes this page, and the tables of other pages

Every table here is a file in `benchmarks/results`, written by the command below it, with the machine and the date. This
page is written by a script, and a test compares it, and the tables of README and of the other pages, with the files.
What the numbers mean is on the pages about each subject.

Runs of the GPU check (`benchmarks/gpu_check.sh`) are kept as their logs, in `benchmarks/results/gpu-check-*`.
"""


def results() -> dict[str, dict[str, Any]]:
    """The newest result of each name."""
    found = {}
    for path in sorted(RESULTS.glob("*.json"), key=lambda path: path.stem[-10:]):
        found[path.stem[:-11]] = {**json.loads(path.read_text(encoding="utf-8")), "file": path.name}
    return found


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def page(found: dict[str, dict[str, Any]]) -> str:
    """The page of all results."""
    lines, left = [HEAD], dict(found)
    for part, prefixes in PARTS.items():
        names = [name for prefix in prefixes for name in found if name.startswith(prefix) and name in left]
        lines += [f"## {part}", ""] if names else []
        for name in names:
            one = left.pop(name)
            lines += [f"### {one['title']}", "", row(one["columns"]), "|" + " --- |" * len(one["columns"])]
            lines += [row(cells) for cells in one["rows"][:SHOWN]]
            more = len(one["rows"]) - SHOWN
            lines += ["", f"and {more:,} more rows."] if more > 0 else []
            command = one["command"] if "`" in one["command"] else f"`{one['command']}`"
            lines += ["", f"{one['hardware']}, torch {one['torch']}, {one['date']}: {command}", ""]
            lines += [f"`benchmarks/results/{one['file']}`", ""]
    return "\n".join(lines).rstrip() + "\n"


def current(text: str, found: dict[str, dict[str, Any]], name: str) -> tuple[str, list[str]]:
    """A page with its marked tables rewritten, and what is wrong with the others."""
    lines, problems, at = text.splitlines(), list[str](), 0
    while at < len(lines):
        mark = MARK.fullmatch(lines[at])
        at += 1
        if mark is None:
            continue
        begin = at + 1
        end = begin
        while end < len(lines) and lines[end].lstrip().startswith("|"):
            end += 1
        missing = [stem for stem in mark[2].split() if stem not in found]
        if missing or end - begin < 3:
            problems.append(f"{name}:{at}: " + (f"there is no result {missing}" if missing else "no table follows"))
        elif mark[1] == "table":
            if lines[begin].count("|") - 1 != len(found[mark[2]]["columns"]):
                problems.append(f"{name}:{at}: the header has another number of columns than {mark[2]}")
            indent = lines[begin][: lines[begin].index("|")]
            lines[begin + 2 : end] = [indent + row(cells) for cells in found[mark[2]]["rows"]]
        else:
            known = {n for stem in mark[2].split() for n in NUMBER.findall(json.dumps(found[stem], ensure_ascii=False))}
            cells = [cell for line in lines[begin + 2 : end] for cell in line.strip().strip("|").split("|")[1:]]
            numbers = [number for cell in cells for number in NUMBER.findall(cell)]
            wrong = [n for n in numbers if n not in known and n.replace(",", "") not in known]
            problems += [f"{name}:{at}: not in {mark[2]}: {', '.join(wrong)}"] if wrong else []
    return "\n".join(lines) + "\n", problems


def main() -> int:
    found, check, problems = results(), "--check" in sys.argv[1:], list[str]()
    texts = {path: path.read_text(encoding="utf-8") for path in PAGES if path != BENCHMARKS}
    texts[BENCHMARKS] = BENCHMARKS.read_text(encoding="utf-8") if BENCHMARKS.exists() else ""
    for path, text in texts.items():
        if path == BENCHMARKS:
            new, wrong = page(found), []
        else:
            new, wrong = current(text, found, path.name)
        problems += wrong
        if new != text and check:
            problems.append(f"{path.name} is not current; run python docs/measured.py")
        elif new != text:
            path.write_text(new, encoding="utf-8")
    print("\n".join(problems) or "every marked number is that of a result")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
