"""Law: what is installed is the packages, typed, and nothing else; importing the core adds little to torch."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PACKAGES = ("zo_core", "hf_zo", "lightning_zo")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, so that the working tree stays as it is."""
    copy = tmp_path_factory.mktemp("source")
    skip = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", "site")
    shutil.copytree(ROOT, copy, ignore=skip, dirs_exist_ok=True)
    code = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
    run = subprocess.run([sys.executable, "-c", code, str(copy)], cwd=copy, capture_output=True, text=True, check=True)
    return zipfile.ZipFile(copy / run.stdout.splitlines()[-1])


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    built = {name for name in wheel.namelist() if ".dist-info/" not in name}
    sources = {path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")} | {
        f"{package}/py.typed" for package in PACKAGES
    }
    assert built == sources


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    (folder,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    metadata = Parser().parsestr(wheel.read(f"{folder}/METADATA").decode())
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    assert metadata["License-Expression"] == PROJECT["license"]
    commands = wheel.read(f"{folder}/entry_points.txt").decode()
    assert "zo-estimate = hf_zo.estimate.cli:main" in commands
    assert "zo-seedlog = zo_core.seedlog.__main__:main" in commands
    assert any(name.endswith("/licenses/LICENSE") for name in wheel.namelist())


def test_versions_agree() -> None:
    import zo_core

    assert zo_core.__version__ == PROJECT["version"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.*)$", citation, re.MULTILINE) == [PROJECT["version"]]


def test_the_workflow_runs_what_ci_runs_on_every_python_that_is_promised() -> None:
    """`.ci/run` needs 3.11 itself; the tests run on the others."""
    workflow = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    (matrix,) = re.findall(r"python-version: (\[.*\])", workflow)
    prefix = "Programming Language :: Python :: 3."
    promised = [one.removeprefix(prefix) for one in PROJECT["classifiers"] if one.startswith(prefix)]
    assert ["3.11", *json.loads(matrix)] == [f"3.{minor}" for minor in promised]
    assert PROJECT["requires-python"] == f">=3.{promised[0]}"
    assert "run: bash .ci/run" in workflow
    assert " .ci/package " in (ROOT / ".ci/run").read_text(encoding="utf-8")


def test_ci_runs_on_the_oldest_versions_that_are_promised() -> None:
    """All that users need has a lowest version, and each is what `.ci/oldest.py` has CI install."""
    extras = PROJECT["optional-dependencies"]
    promised = [
        *PROJECT["dependencies"],
        *(one for name in ("hf", "lightning", "int4", "torchao", "plot") for one in extras[name]),
    ]
    command = [sys.executable, str(ROOT / ".ci" / "oldest.py")]
    pins = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert {one.replace(">=", "==") for one in promised} <= set(pins)
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", pin) for pin in pins)
    assert ".ci/oldest.py" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_ci_runs_the_two_commands_of_the_readme() -> None:
    """It finds them by these patterns, and would stop without a word about why if it did not."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    patterns = re.findall(r"grep -x '(.*)' README.md", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    assert [len(re.findall(f"^{pattern}$", readme, re.MULTILINE)) for pattern in patterns] == [1, 1]


def run(code: str) -> str:
    """What a program prints, in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return result.stdout


def test_importing_the_core_adds_little_to_torch() -> None:
    """By modules, not by time: what is not loaded cannot cost any."""
    code = (
        "import json, sys, torch, safetensors.torch; before = set(sys.modules); import zo_core; "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    added = json.loads(run(code))
    foreign = [name for name in added if name.split(".")[0] not in {*sys.stdlib_module_names, "zo_core"}]
    assert not foreign
    assert len([name for name in added if not name.startswith("zo_core")]) < 12


@pytest.mark.parametrize(
    ("missing", "statements", "extra"),
    [
        ("transformers", ("import hf_zo", "import hf_zo.estimate.cli"), "hf"),
        ("accelerate", ("import hf_zo",), "hf"),
        ("lightning", ("import lightning_zo",), "lightning"),
    ],
)
def test_a_missing_extra_is_named(missing: str, statements: tuple[str, ...], extra: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None\n"
    for statement in statements:
        code += f"try:\n    {statement}\nexcept Exception as error:\n    print(repr(str(error)))\n"
    errors = run(code).splitlines()
    assert len(errors) == len(statements)
    assert all(f"pip install 'zo-trainer[{extra}]'" in error for error in errors)
    assert extra in PROJECT["optional-dependencies"]


def test_what_is_optional_is_optional() -> None:
    """Each is needed by some users only, and none by an import."""
    names = ("peft", "bitsandbytes", "torchao", "lightning", "triton", "trl", "datasets")
    code = f"import sys; sys.modules.update(dict.fromkeys({names!r})); import zo_core, hf_zo; print('fine')"
    assert run(code) == "fine\n"


def test_public_names_are_loaded_at_their_first_use() -> None:
    """`Trainer` takes seconds to import, which ``zo-estimate --help`` need not wait for."""
    code = (
        "import json, sys, hf_zo, hf_zo.estimate.cli; early = [m for m in ('transformers', 'accelerate') if m in "
        "sys.modules]; listed = set(hf_zo.__all__) <= set(dir(hf_zo)); from hf_zo import *; "
        "print(json.dumps([early, listed, [name for name in hf_zo.__all__ if name not in globals()]]))"
    )
    assert json.loads(run(code).splitlines()[-1]) == [[], True, []]
    assert run("import hf_zo; print(hasattr(hf_zo, 'ZOTrainr'))") == "False\n"
