"""Writes the table of settings.md from the texts beside the fields of `zo_core.ZOConfig`.

python docs/settings.py
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from zo_core import ZOConfig

PAGE = Path(__file__).with_suffix(".md")
HEAD = "| setting | default | what it is |"


def table() -> str:
    """A row for each setting, in the order of `ZOConfig`."""
    rows = [f"| `{one.name}` | `{one.default!r}` | {ZOConfig.help_for(one.name)} |" for one in fields(ZOConfig)]
    return "\n".join([HEAD, "| --- | --- | --- |", *rows]) + "\n"


def page(text: str) -> str:
    """The page with its table, which is the last thing on it, written anew."""
    return text[: text.index(HEAD)] + table()


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
