"""Named components: a string in a configuration names a small frozen dataclass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, Generic, TypeVar

T = TypeVar("T")

#: What papers and other programs call a component, or something else that does the same.
OTHER_NAMES = {
    "mezo": "; MeZO is estimator='spsa', with noise='gaussian' for its directions",
    "normal": "; normally distributed directions are noise='gaussian'",
    "lozo": "; LOZO is noise='low_rank'",
    "qzo": "; QZO is target='int4_scales' or 'torchao_scales'",
    "sparse_mezo": "; Sparse-MeZO is noise='sparse'",
    "cge": "; coordinate-wise estimates are estimator='spsa' with noise='coordinates'",
    "deepzero": "; DeepZero's estimates are estimator='spsa' with noise='coordinates'",
    "adam": "; for Adam pass optimizer=torch.optim.AdamW(...), which finds the estimate in .grad",
    "adamw": "; for AdamW pass optimizer=torch.optim.AdamW(...), which finds the estimate in .grad",
}


def similar(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for a word that is much like a known one, else nothing."""
    close = get_close_matches(word.lower(), list(known), 1, 0.75)
    return f"; did you mean {close[0]!r}?" if close else ""


class Registry(Generic[T]):
    """Names for the components of one kind.

    A component is a frozen dataclass with a class attribute ``name``; the object is its own
    configuration and its own record. To add one, write the class in a file of its own and decorate
    it with ``@REGISTRY.register``.
    """

    def __init__(self, kind: str, base: type[T]):
        self.kind = kind
        self.base = base
        self._classes: dict[str, type[T]] = {}

    def register(self, cls: type[T]) -> type[T]:
        self._classes[cls.name] = cls  # type: ignore[attr-defined]
        return cls

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)

    def resolve(self, value: Any) -> T:
        """The component that ``value`` names.

        Args:
            value: a registered name, ``{"name": ..., **fields}``, or a component, returned as it is.

        Raises:
            ValueError: an unknown name or field; the message lists the known ones.
        """
        if isinstance(value, self.base):
            return value
        options: dict[str, Any] = {}
        if isinstance(value, dict):
            options = dict(value)
            value = options.pop("name", None)
        if not isinstance(value, str) or value not in self._classes:
            known = ", ".join(repr(name) for name in self._classes)
            meant = ""
            if isinstance(value, str):
                meant = OTHER_NAMES.get(value.lower(), similar(value, self._classes))
            raise ValueError(f"{self.kind}={value!r} is not known; write one of {known}, or pass an object{meant}")
        cls = self._classes[value]
        try:
            return cls(**options)
        except TypeError:
            known = ", ".join(field.name for field in fields(cls)) or "none"  # type: ignore[arg-type]
            raise ValueError(f"{self.kind} {value!r} was given {sorted(options)}; its fields are: {known}") from None

    def describe(self, component: T) -> str | dict[str, Any]:
        """The inverse of `resolve`: only the name if every field has its default.

        A field with ``metadata={"since": ...}`` is left out if it has its default, as in the logs and checkpoints that
        were written before there was such a field.
        """
        name: str = component.name  # type: ignore[attr-defined]
        values = asdict(component) if is_dataclass(component) and not isinstance(component, type) else {}
        try:
            if component == type(component)():
                return name
        except TypeError:
            pass
        later = {
            field.name: field.default
            for field in (fields(component) if is_dataclass(component) else ())
            if "since" in field.metadata
        }
        return {"name": name, **{key: value for key, value in values.items() if later.get(key, later) != value}}
