"""Law: the tour in examples/ runs as a notebook, and is kept with its outputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TOUR = ROOT / "examples" / "tour.ipynb"

#: In a process of its own: Jupyter's client warns of what tests take for an error.
RUN = """
import sys
import nbclient, nbformat
book = nbformat.read(sys.argv[1], as_version=4)
where = {"metadata": {"path": sys.argv[2]}}
nbclient.NotebookClient(book, timeout=240, kernel_name="python3", resources=where).execute()
nbformat.write(book, sys.argv[3])
"""


def printed(book: dict[str, Any]) -> str:
    outputs = [out for cell in book["cells"] if cell["cell_type"] == "code" for out in cell["outputs"]]
    return "".join("".join(out["text"]) for out in outputs if out["output_type"] == "stream")


def test_the_outputs_are_kept_and_light() -> None:
    assert TOUR.stat().st_size < 200_000
    book = json.loads(TOUR.read_text(encoding="utf-8"))
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [
        out for cell in cells for out in cell["outputs"] if out["output_type"] == "error" or out.get("name") == "stderr"
    ]
    assert "give the same weights: True" in printed(book)


@pytest.mark.slow
def test_the_tour_runs(tmp_path: Path) -> None:
    env = os.environ | {"ZO_TOUR_STEPS": "10", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RUN, TOUR, tmp_path, tmp_path / "run.ipynb"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shown = printed(json.loads((tmp_path / "run.ipynb").read_text(encoding="utf-8")))
    assert "give the same weights: True" in shown
    assert "the same losses: True, the same weights: True" in shown
