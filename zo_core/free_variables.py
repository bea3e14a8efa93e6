"""What a closure reads from outside: a loop that goes on changes it, and a closure that is called later sees that."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from types import CellType, CodeType, FunctionType
from typing import Any

#: What a variable holds that has no value.
_NOTHING = object()


class FreeVariables:
    """The variables that a closure reads from around it, and what they hold now.

    These are variables of enclosing functions and globals, also of closures that it holds, in a `partial` or as a
    variable. Those that a closure assigns itself, as a counter of its calls, do not count. Attributes, and tensors and
    lists whose contents change, cannot be seen this way.

    Args:
        closure: any callable.
    """

    def __init__(self, closure: Callable[..., Any]):
        plain = isinstance(closure, (FunctionType, partial)) or inspect.ismethod(closure)
        functions = _functions(closure if plain else type(closure).__call__)
        own = frozenset[str]().union(*(_names(function.__code__)[1] for function in functions))
        self._held = [(name, place, _value(name, place)) for name, place in _read(functions) if name not in own]

    def changed(self) -> list[str]:
        """The names of the variables that hold something else by now, in alphabetical order."""
        return sorted({name for name, place, value in self._held if not _same(value, _value(name, place))})


def bound(names: list[str]) -> str:
    """How a lambda is written that keeps what variables hold."""
    return f"lambda {', '.join(f'{name}={name}' for name in names)}: ..."


def _functions(closure: Any) -> list[FunctionType]:
    """The functions of a closure, and those that it holds."""
    found: list[FunctionType] = []
    waiting = [closure]
    while waiting:
        value = waiting.pop()
        if isinstance(value, partial):
            waiting += [value.func, *value.args, *value.keywords.values()]
        elif inspect.ismethod(value):
            waiting.append(value.__func__)
        elif isinstance(value, FunctionType) and value not in found:
            found.append(value)
            waiting += [_value("", cell) for cell in value.__closure__ or ()]
    return found


def _read(functions: list[FunctionType]) -> Iterator[tuple[str, Any]]:
    """Name and place of each variable that functions read: a cell, or the globals of a module."""
    for function in functions:
        yield from zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        yield from ((name, function.__globals__) for name in _names(function.__code__)[0])


@lru_cache(maxsize=256)
def _names(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The names of the globals that code reads, and of what it assigns outside of its function."""
    instructions = list(dis.get_instructions(code))
    read = {each.argval for each in instructions if each.opname == "LOAD_GLOBAL"}
    own = {each.argval for each in instructions if each.opname in ("STORE_GLOBAL", "STORE_DEREF")}
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return frozenset(read).union(*(pair[0] for pair in inner)), frozenset(own).union(*(pair[1] for pair in inner))


def _value(name: str, place: Any) -> Any:
    if not isinstance(place, CellType):
        return place.get(name, _NOTHING)
    try:
        return place.cell_contents
    except ValueError:  # not assigned yet
        return _NOTHING


def _same(one: Any, other: Any) -> bool:
    """Whether a variable holds the same object, or an equal number or string."""
    return one is other or (type(one) is type(other) and isinstance(one, (int, float, str)) and bool(one == other))
