"""Writes ``docs/compatibility.md``, or checks it.

python -m benchmarks.compatibility --write           # some minutes on one core
python -m benchmarks.compatibility --check           # defaults of all cases, all ways of the first of each trainer
python -m benchmarks.compatibility --check --all
python -m benchmarks.compatibility GRPO dpo          # shows the cases that contain these words
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from importlib.metadata import version

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}

from .compare import WAYS, Row, row
from .page import PAGE, about, page, written
from .written_out import Case

LIBRARIES = ("torch", "transformers", "peft", "trl", "sentence-transformers", "lightning")


def families() -> dict[str, list[Case]]:
    """All cases, by the heading of their table."""
    import datasets

    datasets.disable_progress_bars()
    from . import lightning_cases, sentence_cases, transformers_cases, trl_cases

    return {
        "transformers": list(transformers_cases.CASES),
        "TRL": list(trl_cases.CASES),
        "sentence-transformers": list(sentence_cases.CASES),
        "Lightning": list(lightning_cases.CASES),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only show cases with one of these words")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--all", action="store_true", help="check each case in all ways")
    args = parser.parse_args()
    if not (args.words or args.write or args.check):
        parser.error("write --write, --check, or some words of a case")
    rows: dict[str, list[Row]] = {}
    every = families()
    gc.freeze()  # accelerate collects garbage at every train(), over everything that was imported
    for family, cases in every.items():
        seen: set[str] = set()
        for case in cases:
            if args.words and not any(word.lower() in f"{case.trainer} {case.setting}".lower() for word in args.words):
                continue
            whole = args.all or not args.check or case.trainer not in seen
            seen.add(case.trainer)
            found = row(case, list(WAYS) if whole else ["default"])
            rows.setdefault(family, []).append(found)
            print(f"{'FAILS  ' if found.fails else ''}{family}: {about(found)}", flush=True)
    flat = [each for found in rows.values() for each in found]
    problems = [f"wrong: {about(each)}" for each in flat if each.fails]
    if args.check:
        problems += [f"not so in {PAGE.name}: {about(each)}" for each in flat if not each.fails and not written(each)]
    if args.write:
        PAGE.write_text(page(rows, [f"{name} {version(name)}" for name in LIBRARIES]), encoding="utf-8")
    if problems:
        sys.exit("\n".join(["", *problems]))


if __name__ == "__main__":
    main()
