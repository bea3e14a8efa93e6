"""Law: imports point one way, the engine knows no trainer, and trainers know of it what is public."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: Each part of zo_core may import from parts of a lower rank, and within itself.
RANKS = {
    "records": 0,
    "errors": 0,
    "files": 0,
    "registry": 0,
    "cache": 0,
    "charts": 0,
    "curves": 0,
    "report": 1,
    "dispatch": 0,
    "stand_ins": 0,
    "modes": 0,
    "progress": 0,
    "queries": 1,
    "sizes": 0,
    "version": 0,
    "whole": 0,
    "writers": 0,
    "forward_state": 1,
    "free_variables": 0,
    "noise": 1,
    "exchange": 1,
    "ambient": 1,
    "backprop": 4,
    "beside_streamed": 5,
    "digests": 0,
    "ranks": 2,
    "targets": 2,
    "probing": 3,
    "streaming": 4,
    "estimators": 4,
    "rules": 4,
    "updates": 5,
    "step": 5,
    "defaults": 5,
    "normaliser": 2,
    "brake": 6,
    "settings": 5,
    "config": 6,
    "summary": 6,
    "first_steps": 6,
    "checkpoint": 7,
    "state_keys": 3,
    "optimizer": 8,
    "directions": 9,
    "placement": 9,
    "live": 9,
    "running": 9,
    "shared_data": 5,
    "agreement": 10,
    "undoing": 10,
    "second_round": 10,
    "last_look": 11,
    "following": 10,
    "gradient_check": 10,
    "trained_model": 11,
    "learning_rate": 12,
    "engine": 13,
    "adapter": 14,
    "seedlog": 14,
    "suggest": 14,
    "__init__": 15,
}
THIRD_PARTY = {"torch", "numpy", "safetensors", "triton", "matplotlib"}  # the last two at use, if they are there

#: Optional packages, each with the one file that knows it.
OPTIONAL = {
    "bitsandbytes": ROOT / "zo_core/targets/int4.py",
    "torchao": ROOT / "zo_core/targets/torchao.py",
}
ADAPTERS = ("hf_zo", "lightning_zo")


def imports(path: Path, *, typing: bool = False) -> Iterator[str]:
    """Absolute names of what a file imports anywhere.

    Args:
        path: of the file.
        typing: with what it imports where only type checkers look.
    """
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and not typing
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def part(path: Path) -> str:
    return path.relative_to(ROOT / "zo_core").with_suffix("").parts[0]


@pytest.mark.parametrize("path", files("zo_core"), ids=lambda path: str(path.relative_to(ROOT)))
def test_zo_core_imports_point_one_way(path: Path) -> None:
    mine = part(path)
    for name in imports(path, typing=True):
        top, *rest = name.split(".")
        if top == "zo_core":
            theirs = rest[0] if rest and rest[0] in RANKS else "__init__"
            assert theirs == mine or RANKS[theirs] < RANKS[mine], f"{mine} imports {name}"
        else:
            assert top in sys.stdlib_module_names | THIRD_PARTY or OPTIONAL.get(top) == path, f"{mine} imports {name}"


def test_no_file_imports_itself_by_way_of_others() -> None:
    """Imports that only type checkers see count, too: a circle of names is one for readers."""
    paths = [path for package in ("zo_core", *ADAPTERS) for path in files(package)]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    graph = {}
    for module, path in modules.items():
        names = imports(path, typing=True)
        found = {name if name in modules else name.rpartition(".")[0] for name in names}
        graph[module] = (found & modules.keys()) - {module}
    TopologicalSorter(graph).prepare()  # an error that names the circle


def test_every_part_has_a_rank() -> None:
    assert {part(path) for path in files("zo_core")} == set(RANKS)


def test_estimators_never_see_a_tensor() -> None:
    for path in files("zo_core/estimators"):
        assert not [name for name in imports(path) if name.split(".")[0] == "torch"]


@pytest.mark.parametrize("package", ADAPTERS)
def test_adapters_do_not_import_each_other(package: str) -> None:
    others = set(ADAPTERS) - {package}
    for path in files(package):
        assert not [name for name in imports(path) if name.split(".")[0] in others], path


@pytest.mark.parametrize("path", [p for name in ADAPTERS for p in files(name)], ids=lambda p: str(p.relative_to(ROOT)))
def test_adapters_import_what_zo_core_makes_public(path: Path) -> None:
    """From zo_core itself, or else from one of its rooms: what a package exports, or a file has without underscore."""
    top = importlib.import_module("zo_core")
    for full in imports(path, typing=True):
        first, *rest = full.split(".")
        if first != "zo_core":
            continue
        room, name = ".".join([first, *rest[:-1]]), rest[-1]
        assert room.count(".") <= 1, f"{full} is inside of a room"
        module = importlib.import_module(room)
        found = getattr(module, name)
        exported = module.__all__ if hasattr(module, "__all__") else [name]
        assert name in exported, f"{room} does not export {name}"
        assert not name.startswith("_"), full
        if not hasattr(module, "__path__"):
            assert getattr(found, "__module__", room) == room, f"{name} is from {found.__module__}"
        public = name in top.__all__ and getattr(top, name) is found
        assert room == "zo_core" or not public, f"from zo_core import {name}, as users do"


#: What an engine is called in the adapters.
ENGINES = {"zo", "engine"}
#: Settings that users may set, too.
SETTABLE = {"lr", "eps", "weight_decay", "rule"}


def is_engine(node: ast.expr) -> bool:
    """Whether an expression is an engine: ``zo``, ``self.zo``."""
    return (node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else "") in ENGINES


def of_engine(node: ast.expr) -> bool:
    """Whether an expression is an engine or a part of one."""
    inner = isinstance(node, (ast.Attribute, ast.Subscript)) and of_engine(node.value)
    return inner or is_engine(node)


def trespasses(source: str) -> list[str]:
    """Where code sets what is an engine's, or reads what it keeps to itself."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Attribute, ast.Subscript)) and of_engine(node.value):
            name = node.attr if isinstance(node, ast.Attribute) else ""
            sets = not isinstance(node.ctx, ast.Load) and not (is_engine(node.value) and name in SETTABLE)
            if sets or name.startswith("_"):
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", [p for name in ADAPTERS for p in files(name)], ids=lambda p: str(p.relative_to(ROOT)))
def test_adapters_set_nothing_of_an_engine_s(path: Path) -> None:
    assert not trespasses(path.read_text(encoding="utf-8"))


def test_what_an_adapter_must_not_do_is_seen() -> None:
    bad = ("zo.step_count = 1", "self.zo.listeners = []", "engine.continuity.ahead += 1", "self.engine.given['a'] = 1")
    assert [len(trespasses(line)) for line in (*bad, "x = zo._plan", "del self.zo.rule.beta")] == [1] * 6
    good = ("zo = ZeroOrder(model)", "self.zo = zo", "engine.rule = Momentum(0.5)", "x = zo.optimizer.state['a']")
    assert not [line for line in good if trespasses(line)]


def test_importing_zo_core_loads_no_trainer() -> None:
    optional = ("transformers", "lightning", "pytorch_lightning", "peft", "accelerate", "bitsandbytes", "torchao")
    names = (*optional, *ADAPTERS)
    code = f"import sys, zo_core; print([name for name in {names!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
