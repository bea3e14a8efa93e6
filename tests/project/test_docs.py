"""Law: every Python snippet in README and docs runs as it stands there.

A snippet is a fence marked ``python``, or an indented block that parses as Python. It finds the names that its
page takes for granted (a model, a loader, …) as tiny ones. One that cannot run here has a comment
``<!-- not run: why -->`` in front of it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import dedent
from typing import Any

import lightning
import pytest
import torch
from hf_helpers import texts
from lightning_helpers import QUIET, Wrapped, loader
from models import batch, tiny
from torch import nn
from trl_helpers import small_tokenizer

import lightning_zo
import zo_core
from hf_zo import ZOTrainer, ZOTrainerMixin, ZOTrainingArguments
from zo_core import ESTIMATORS, NOISES, RULES, TARGETS, ZeroOrder

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

#: What a stranger has and a test has not: much time, and a GPU.
HERE = {
    "max_steps=5000": "max_steps=2",
    "max_completion_length=64": "max_completion_length=4",
    'accelerator="cuda"': 'accelerator="cpu"',
}

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator"),
]


@dataclass(frozen=True)
class Snippet:
    """A piece of Python in a page, with the reason why it is not run, if there is one."""

    page: str
    line: int
    code: str
    excuse: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def snippets(page: Path) -> Iterator[Snippet]:
    """All of a page's, in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    excuse: str | None = None
    at = 0
    while at < len(lines):
        begin, line = at, lines[at]
        at += 1
        if match := re.fullmatch(r"<!-- not run: (.+) -->", line):
            excuse = match[1]
        elif line.startswith("```"):
            while not lines[at].startswith("```"):
                at += 1
            at += 1
            if line.strip() == "```python":
                yield Snippet(page.name, begin + 1, "\n".join(lines[begin + 1 : at - 1]), excuse)
            excuse = None
        elif line.startswith("    ") and (begin == 0 or not lines[begin - 1].strip()):
            while at < len(lines) and (lines[at].startswith("    ") or not lines[at].strip()):
                at += 1
            code = dedent("\n".join(lines[begin:at]))
            if is_python(code):
                yield Snippet(page.name, begin + 1, code, excuse)
            excuse = None
        elif line.strip():
            excuse = None


def is_python(code: str) -> bool:
    """Whether an indented block is a program: shell commands, formulas and YAML are not."""
    try:
        body = ast.parse(code).body
    except SyntaxError:
        return False
    return any(not isinstance(s, ast.Expr) or isinstance(s.value, ast.Call) for s in body)


class TwoParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(4, 4), nn.Linear(4, 2)


def surroundings(code: str) -> dict[str, Any]:
    """The names that pages take for granted."""
    model = TwoParts() if "model.encoder" in code else tiny("llama")
    rows = texts(8)
    names = {name: getattr(zo_core, name) for name in zo_core.__all__}
    taken: dict[str, Any] = {
        "__name__": "__main__",
        "model": model,
        "module": Wrapped("llama"),
        "loader": loader(),
        "batch": batch("llama"),
        "train": rows,
        "held_out": rows,
        "tokenizer": small_tokenizer() if "ZORewardTrainer" in code else None,
        "rows": [{"prompt": "w1 w2", "answer": "w3"}] * 4,
        "torch": torch,
        "L": lightning,
        "lightning": lightning,
        "lightning_zo": lightning_zo,
        "zo_core": zo_core,
        "ZOTrainer": ZOTrainer,
        "ZOTrainerMixin": ZOTrainerMixin,
        "ZOTrainingArguments": ZOTrainingArguments,
    }
    if "zo." in code and "zo =" not in code:
        taken["zo"] = ZeroOrder(model, lr=1e-3)
    return names | taken


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder, short Lightning runs, and registries that forget what a page registers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tiny("llama").config.save_pretrained(tmp_path / "folder-with-a-config")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    short = partial(lightning.Trainer, max_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet)
    monkeypatch.setattr(lightning, "Trainer", short)
    registries = (ESTIMATORS, NOISES, RULES, TARGETS)
    before = [dict(registry._classes) for registry in registries]
    with torch.random.fork_rng():
        yield
    for registry, classes in zip(registries, before, strict=True):
        registry._classes.clear()
        registry._classes.update(classes)


ALL = [snippet for page in PAGES for snippet in snippets(page)]


@pytest.mark.parametrize("snippet", [s for s in ALL if s.excuse is None], ids=str)
def test_the_snippet_runs(snippet: Snippet, stage: None) -> None:
    code = snippet.code
    for there, here in HERE.items():
        code = code.replace(there, here)
    names = surroundings(code)
    exec(compile(code, str(snippet), "exec", dont_inherit=True), names)
    for value in list(names.values()):
        if isinstance(value, ZeroOrder):
            value.close()


def test_pages_have_snippets_and_few_excuses() -> None:
    assert {s.page for s in ALL} >= {"README.md", "quickstart.md", "using.md", "extending.md", "estimate.md"}
    assert sum(s.excuse is not None for s in ALL) <= len(ALL) // 3


def test_what_counts_as_a_snippet(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "text\n\n    x = 1\n\n    y = x\n\nand\n\n    zo-estimate some/model --json\n\n"
        "    θ ← θ − lr · g · z\n\n<!-- not run: needs a GPU -->\n```python\nz = 1\n```\n```bash\nls\n```\n"
        "```python\nw = 1\n```\n* a list\n    x = 2\n",
        encoding="utf-8",
    )
    found = list(snippets(page))
    assert [(s.line, s.code.strip(), s.excuse) for s in found] == [
        (3, "x = 1\n\ny = x", None),
        (14, "z = 1", "needs a GPU"),
        (20, "w = 1", None),
    ]
