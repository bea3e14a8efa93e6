"""The page with the tables."""

from __future__ import annotations

from pathlib import Path

from .compare import REFUSED, WAYS, Row

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"

#: The program writes what is below this line of the page.
MARK = "<!-- below: python -m benchmarks.compatibility --write -->"


def page(rows: dict[str, list[Row]], versions: list[str]) -> str:
    """The whole page, including the hand-written text."""
    prose = PAGE.read_text(encoding="utf-8").split(MARK)[0]
    parts = [prose + MARK, f"Measured with {', '.join(versions)}."]
    for family, found in rows.items():
        head = f"| trainer | with | {' | '.join(WAYS)} | remark |"
        lines = [line(each) for each in found]
        parts.append("\n".join([f"## {family}\n", head, "|" + " --- |" * (len(WAYS) + 3), *lines]))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def line(row: Row) -> str:
    """A row of the table."""
    return f"| {' | '.join(cells(row))} |"


def cells(row: Row) -> list[str]:
    """The cells of a row of the table; a question mark for what was not measured."""
    setting = f"`{row.case.setting}`" if "=" in row.case.setting or "Loss" in row.case.setting else row.case.setting
    results = [row.results.get(way, "?") for way in WAYS]
    said = row.said if REFUSED in results else ""
    remark = " ".join(part for part in (row.case.remark, said) if part).replace("|", "\\|")
    return [f"`{row.case.trainer}`", setting, *results, remark]


def about(row: Row) -> str:
    """A row as text for a terminal."""
    *what, remark = cells(row)
    return "  ".join([*what, f"(slope {row.detached:.3f})" if row.detached > 1e-2 else "", remark])


def written(row: Row) -> bool:
    """Whether the page has this row, as far as it was measured."""
    mine = cells(row)
    known = len(mine) if "?" not in mine else mine.index("?")
    return any(_cells(text)[:known] == mine[:known] for text in PAGE.read_text(encoding="utf-8").splitlines())


def _cells(text: str) -> list[str]:
    parts = text.replace("\\|", "\0").strip().removeprefix("| ").removesuffix("|").split(" | ")
    return [part.replace("\0", "\\|").strip() for part in parts]
