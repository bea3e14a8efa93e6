"""Law: what we rely on in libraries beyond what they promise is there, and is used; the table of it is complete."""

from __future__ import annotations

import ast
import inspect
import pkgutil
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from seam_habits import HABITS
from seam_runs import trainer
from seam_watch import Habit, Seam, is_there, uses
from seams import MIXIN, SEAMS

ROOT = Path(__file__).parents[2]
PACKAGES = ("zo_core", "hf_zo", "lightning_zo")

#: Underscored names that are no seams: the standard library's, and what we set on foreign objects.
NO_SEAMS = {"_exit", "_abc_impl", "_is_protocol", "_zo_bring", "_", "_backward_cls"}

_found: dict[Callable[..., Any], Counter[Seam]] = {}


def case(row: Seam | Habit) -> str:
    return f"{row.name}-{Path(row.file).stem}"


def failure(row: Seam | Habit, what: str) -> str:
    return f"{row.library} {version(row.library)}: {row.name} {what}. {row.file} relies on it: {row.why}"


@pytest.mark.parametrize("seam", SEAMS, ids=case)
def test_what_we_rely_on_is_there_and_is_used(seam: Seam, tmp_path: Path) -> None:
    pytest.importorskip(seam.library)
    assert is_there(seam), failure(seam, "is not there any more")
    if seam.run not in _found:
        together = [other for other in SEAMS if other.run is seam.run]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _found[seam.run] = uses(together, tmp_path)
    assert _found[seam.run][seam], failure(seam, f"was not used by {seam.by} in a run of {seam.run.__name__}")


@pytest.mark.parametrize("habit", HABITS, ids=case)
def test_libraries_do_what_we_rely_on(habit: Habit, tmp_path: Path) -> None:
    pytest.importorskip(habit.library)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        holds = habit.holds(tmp_path)
    assert holds, failure(habit, "does not do what it did")


def test_what_nobody_uses_is_noticed(tmp_path: Path) -> None:
    ours = {"ours": "hf_zo.mixin:ZOTrainerMixin", "reader": "transformers"}
    gone = Seam("transformers:Trainer._save_all_checkpoints", MIXIN, "", trainer, **ours)
    idle = Seam("transformers:Trainer.prediction_step", MIXIN, "", trainer, **ours)
    used = Seam("transformers:Trainer.training_step", MIXIN, "", trainer, **ours)
    assert [is_there(seam) for seam in (gone, idle, used)] == [False, True, True]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = uses([gone, idle, used], tmp_path)
    assert [found[seam] for seam in (gone, idle, used)] == [0, 0, 4]


# The table is complete


def files() -> dict[Path, ast.Module]:
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {path.relative_to(ROOT): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined(trees: list[ast.Module]) -> set[str]:
    """All names that our own code gives to something of its own."""
    names: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                names.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def foreign(tree: ast.Module, own: set[str]) -> Iterator[str]:
    """Underscored names of others that a file uses: attributes, also by a string, and imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield from {node.attr} - own
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            yield from {node.value} - own
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module and node.module != "__future__":
            yield from node.module.split(".")
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split("."))


def inherited(package: str) -> Iterator[tuple[str, str]]:
    """Underscored names that a class of ours defines or sets, and a foreign base of it has, too; with the file."""
    root = import_module(package)
    for info in pkgutil.walk_packages(root.__path__, f"{package}."):
        if info.name.endswith("__main__"):
            continue
        try:
            module = import_module(info.name)
        except ImportError:  # a library that is not for every platform
            continue
        for cls in vars(module).values():
            if not inspect.isclass(cls) or cls.__module__ != module.__name__:
                continue
            bases = [base for base in cls.__mro__ if base.__module__.partition(".")[0] not in (*PACKAGES, "builtins")]
            set_here = set(re.findall(r"self\.(_[a-z]\w*)\b[^=\n]*= ", inspect.getsource(cls))) | set(vars(cls))
            for name in filter(is_private, set_here):
                if any(name in vars(base) or f"self.{name} " in source(base) for base in bases):
                    yield f"{info.name.replace('.', '/')}.py", name


def source(cls: type) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return ""


def test_every_private_name_of_others_is_in_the_table() -> None:
    trees = files()
    own = defined(list(trees.values())) | NO_SEAMS
    used = {(path.as_posix(), name) for path, tree in trees.items() for name in foreign(tree, own) if is_private(name)}
    for package in PACKAGES:
        used |= {(file, name) for file, name in inherited(package) if name not in NO_SEAMS}
    rows: dict[str, set[str]] = {}
    for row in (*SEAMS, *HABITS):
        for name in filter(is_private, re.split(r"[.:]", row.name)):
            rows.setdefault(name, set()).add(row.file)
    missing = sorted(f"{file}: {name}" for file, name in used if name not in rows)
    assert not missing, f"add a row to tests/helpers/seams.py for each of {missing}, or use a public name"


@pytest.mark.parametrize("row", [*SEAMS, *HABITS], ids=case)
def test_rows_name_files_that_use_them(row: Seam | Habit) -> None:
    name = re.split(r"[.:]", row.name)[-1]
    assert name in (ROOT / row.file).read_text(encoding="utf-8"), f"{row.file} does not use {name}: remove its row"
