"""Records which modules read an attribute of a library during a small run."""

from __future__ import annotations

import inspect
import pkgutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

_MISSING = object()


@dataclass(frozen=True)
class Seam:
    """A name that a library does not promise to keep, or does not promise to read.

    Attributes:
        name: "module:owner.attribute"; the module itself may be the owner.
        file: our file that relies on it.
        why: what goes wrong without it.
        run: a function that makes the code use it; takes an empty folder.
        ours: where to watch the attribute, if not at its own place: "module:owner" of ours, which overrides
            or imports it.
        reader: the package whose code must use it; None for the file itself. The library must use what we override
            or set.
        anew: whether the library looks for it but does not define it.
    """

    name: str
    file: str
    why: str
    run: Callable[[Path], object]
    ours: str | None = None
    reader: str | None = None
    anew: bool = False

    @property
    def library(self) -> str:
        return self.name.partition(":")[0].partition(".")[0]

    @property
    def parts(self) -> tuple[str, str]:
        """The owner, for `resolve`, and the attribute."""
        module, _, path = self.name.partition(":")
        owner, _, attribute = path.rpartition(".")
        return f"{module}:{owner}", attribute

    @property
    def by(self) -> str:
        return f"{self.reader or self.file.removesuffix('.py').replace('/', '.')}."


@dataclass(frozen=True)
class Habit:
    """A behaviour of a library that is checked directly.

    Attributes:
        name: "module:what", with the names that it concerns.
        file, why: as in `Seam`.
        holds: whether the library does it; takes an empty folder.
    """

    name: str
    file: str
    why: str
    holds: Callable[[Path], bool]

    library = Seam.library


def resolve(place: str) -> Any:
    """The object at "module:path", where the path may be empty."""
    module, _, path = place.partition(":")
    return pkgutil.resolve_name(place) if path else import_module(module)


def _reader() -> str:
    """The module whose code is running, apart from this one."""
    frame = sys._getframe(1)
    while frame.f_globals["__name__"] == __name__ and frame.f_back is not None:
        frame = frame.f_back
    return str(frame.f_globals["__name__"])


Used = Callable[[str, str], None]


def _watch_function(patch: pytest.MonkeyPatch, owner: Any, name: str, used: Used) -> None:
    """A function of a module, or a class method."""
    original = inspect.getattr_static(owner, name, None)
    if original is None:
        return
    function = original.__func__ if isinstance(original, classmethod) else original

    def watched(*args: Any, **kwargs: Any) -> Any:
        used(name, _reader())
        return function(*args, **kwargs)

    patch.setattr(owner, name, classmethod(watched) if isinstance(original, classmethod) else watched)


def _watch_objects(patch: pytest.MonkeyPatch, owner: type, names: set[str], used: Used) -> None:
    """Attributes of the objects of a class: who reads, sets or deletes them. What ``super()`` reads does not count."""
    for method in ("__getattribute__", "__setattr__", "__delattr__"):
        original = vars(owner).get(method)

        def watched(obj: Any, name: str, *value: Any, original: Any = original, method: str = method) -> Any:
            found = (
                getattr(super(owner, obj), method)(name, *value) if original is None else original(obj, name, *value)
            )
            if name in names:
                used(name, _reader())
            return found

        patch.setattr(owner, method, watched, raising=False)


def uses(seams: list[Seam], path: Path) -> Counter[Seam]:
    """How often each was used by the package that has to use it, in their one common run.

    Args:
        seams: with the same ``run``.
        path: an empty folder.
    """
    found: Counter[Seam] = Counter()
    places: dict[Any, list[Seam]] = {}
    for seam in seams:
        places.setdefault(resolve(seam.ours or seam.parts[0]), []).append(seam)
    with pytest.MonkeyPatch.context() as patch:
        for owner, here in places.items():

            def used(name: str, reader: str, here: list[Seam] = here) -> None:
                for seam in here:
                    found[seam] += name == seam.parts[1] and f"{reader}.".startswith(seam.by)

            names = {seam.parts[1] for seam in here}
            of_class = isinstance(owner, type)
            for name in names:
                static = inspect.getattr_static(owner, name, None)
                if not of_class or isinstance(static, classmethod):
                    _watch_function(patch, owner, name, used)
            if of_class:
                _watch_objects(patch, owner, names, used)
        seams[0].run(path)
    return found


def is_there(seam: Seam) -> bool:
    """Whether the library still has what we override; of an attribute of instances, only a run can tell."""
    owner, attribute = seam.parts
    return seam.ours is None or seam.anew or inspect.getattr_static(resolve(owner), attribute, _MISSING) is not _MISSING
