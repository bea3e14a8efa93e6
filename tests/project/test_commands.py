"""Law: every command that a page or a docstring tells people to type has options and values that the program takes."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import SUITES

ROOT = Path(__file__).parents[2]
#: The benchmarks page has the commands of earlier results as they were typed.
PAGES = [ROOT / "README.md", *(page for page in (ROOT / "docs").glob("*.md") if page.name != "benchmarks.md")]
PROGRAMS = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").glob("*.py")]
#: What runs our programs, and the options before them that have a value.
LAUNCHERS = {"torchrun", "accelerate"}
VALUED = {"--nproc_per_node", "--num_processes", "--max-restarts"}
#: Our commands, by the module that they run.
SCRIPTS = {"zo-estimate": "hf_zo.estimate", "zo-seedlog": "zo_core.seedlog"}


def typed() -> Iterator[str]:
    """Everything that looks like a command, each once."""
    found: dict[str, None] = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        found.update(dict.fromkeys(line for block in blocks for line in block.splitlines()))
        found.update(dict.fromkeys(" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)))
    for program in PROGRAMS:
        lines = program.read_text(encoding="utf-8").splitlines()
        found.update(dict.fromkeys(line.strip() for line in lines if line.startswith("    python ")))
    for commands in SUITES.values():
        found.update(
            (shlex.join(["python", "-m", f"benchmarks.{name}", *options, "--save"]), None)
            for name, *options in commands
        )
    parts = re.findall(
        r"^\.venv/bin/(.* examples/.*)$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE
    )
    found.update(dict.fromkeys(parts))
    yield from found


def program(command: str) -> tuple[str, list[str]] | None:
    """The module or file of ours that a command runs, and its arguments; None if it runs none, or is a usage."""
    if "[" in command or "…" in command:
        return None
    try:
        words = shlex.split(command, comments=True)
    except ValueError:
        return None
    if not words:
        return None
    if words[0] in SCRIPTS:  # by its name alone it is only talked about
        named = all(word.startswith("-") for word in words[1:])
        return None if named else (SCRIPTS[words[0]], words[1:])
    if words[0] in LAUNCHERS:
        words = words[1 + (words[1:2] == ["launch"]) :]
        while words and words[0].startswith("--"):
            words = words[1 + (words[0] in VALUED) :]
        words = ["python", *words]
    if words[0] not in ("python", "python3") or len(words) < 2:
        return None
    name, arguments = (words[2], words[3:]) if words[1] == "-m" and len(words) > 2 else (words[1], words[2:])
    return (
        (name, arguments)
        if name.split(".")[0].split("/")[0] in ("benchmarks", "examples", "hf_zo", "zo_core")
        else None
    )


COMMANDS = {command: found for command in typed() if (found := program(command))}


pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules after import")


class Parsed(Exception):
    """The arguments are what the program takes."""


@pytest.fixture
def parses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs end as soon as they have read their arguments."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_end(self: argparse.ArgumentParser, *args: Any) -> None:
        parse(self, *args)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_end)
    monkeypatch.chdir(ROOT)


def run(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    if name.endswith(".py"):
        runpy.run_path(str(ROOT / name), run_name="__main__")
    else:
        runpy.run_module(name, run_name="__main__", alter_sys=False)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_program_takes_its_arguments(command: str, parses: None, monkeypatch: pytest.MonkeyPatch) -> None:
    name, arguments = COMMANDS[command]
    if "flower" in name:
        pytest.importorskip("flwr", reason="flwr is installed for this example alone")
    if name == "benchmarks.drift":  # the one without options
        assert not arguments
        assert find_spec(name)
        return
    with pytest.raises(Parsed):
        run(name, arguments, monkeypatch)


@pytest.mark.parametrize(
    ("name", "arguments"), [("benchmarks.replay", ["--dtyp", "x"]), ("examples/rewards.py", ["--stps=1"])]
)
def test_others_end_with_a_usage(
    name: str, arguments: list[str], parses: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(name, arguments, monkeypatch)
    assert "usage:" in capsys.readouterr().err


def test_there_are_many_commands() -> None:
    assert len(COMMANDS) > 100
    assert any(name == "hf_zo.estimate" for name, _ in COMMANDS.values())
    assert any(command.startswith("torchrun") for command in COMMANDS)
