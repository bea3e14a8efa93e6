"""Noises that change where another noise is applied, not how its values are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .base import NOISES, Noise


@dataclass(frozen=True)
class Wrapping(Noise):
    """A noise that wraps another one; subclasses have a field ``of`` that names it.

    Attributes:
        inner: the wrapped noise.
    """

    def _wrap(self, of: str | dict[str, Any] | Noise) -> None:
        """Resolves ``of``, and keeps it in the plain form that configurations and logs are written in.

        Raises:
            ValueError: ``of`` names no known noise.
        """
        inner = NOISES.resolve(of)
        object.__setattr__(self, "inner", inner)
        object.__setattr__(self, "of", NOISES.describe(inner))

    @property
    def wrapped(self) -> Noise:
        """The wrapped noise."""
        return self.__dict__["inner"]

    def seed(self, base: int, step: int, direction: int) -> int:
        return self.wrapped.seed(base, step, direction)

    def words_of(self, shape: torch.Size) -> int:
        return self.wrapped.words_of(shape)

    def prepare(self, seeds: Sequence[int], slots: Sequence[tuple[str, torch.Size]], device: torch.device) -> None:
        self.wrapped.prepare(seeds, slots, device)

    def forget(self, seeds: Sequence[int], late: bool = False) -> None:
        self.wrapped.forget(seeds, late)


def check_part(name: str, value: object, meaning: str) -> None:
    """Raises `ValueError` unless ``value`` is a number above 0 and at most 1."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0.0 < value <= 1.0:  # type: ignore[operator]
        raise ValueError(f"{name}={value!r} must be above 0 and at most 1: {meaning}, for example 0.25")
