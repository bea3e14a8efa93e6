"""Law: the public names are those on the reference page, and every name there exists."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")

#: Names on the page: documented there, or said to be another name that is.
DOCUMENTED = re.findall(r"^::: (\S+)$", PAGE, re.MULTILINE)
ALIASES = dict(re.findall(r"`([\w.]+)` is `([\w.]+)`", PAGE))

#: Modules all of whose public names are on the page.
WHOLE = ("zo_core", "hf_zo.estimate", "hf_zo", "lightning_zo")
#: Modules that have public names for the other packages of this project, too.
IN_PART = ("zo_core.seedlog",)


def split(name: str) -> tuple[ModuleType, str]:
    """The module that a dotted name says it is from, and the name there."""
    module, _, own = name.rpartition(".")
    return importlib.import_module(module), own


@pytest.mark.parametrize("module", WHOLE)
def test_the_page_has_the_public_names(module: str) -> None:
    public = importlib.import_module(module).__all__
    listed = {name.rpartition(".")[2] for name in [*DOCUMENTED, *ALIASES] if name.rpartition(".")[0] == module}
    assert len(set(public)) == len(public)
    assert listed == set(public)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_documented_name_is_public(name: str) -> None:
    module, own = split(name)
    assert module.__name__ in {*WHOLE, *IN_PART}
    assert own in module.__all__
    assert hasattr(module, own)


@pytest.mark.parametrize("alias", sorted(ALIASES))
def test_an_alias_is_what_the_page_says(alias: str) -> None:
    assert ALIASES[alias] in DOCUMENTED
    (here, one), (there, other) = split(alias), split(ALIASES[alias])
    assert getattr(here, one) is getattr(there, other)


def test_nothing_is_listed_twice() -> None:
    assert not [name for name, count in Counter([*DOCUMENTED, *ALIASES]).items() if count > 1]
