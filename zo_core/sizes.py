"""Numbers with units: parses "8GB" or "25G", and formats numbers of bytes."""

from __future__ import annotations

import math
import re

NUMBER = re.compile(r"\s*(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+)\s*(?:([KMGTP])(i?))?B?\s*", re.IGNORECASE)


def parse_number(text: str) -> float:
    """A positive number; units are powers of 1000 (``"25G"``, ``"8GB"``) or of 1024 (``"8GiB"``).

    Raises:
        ValueError: ``text`` is not such a number.
    """
    match = NUMBER.fullmatch(text)
    if match is None:
        raise ValueError(text)
    number = float(match[1]) * (1024.0 if match[3] else 1000.0) ** " KMGTP".index((match[2] or " ").upper())
    if not 0.0 < number < math.inf:
        raise ValueError(text)
    return number


def parse_bytes(value: int | str | None) -> int | None:
    """A number of bytes, given as a number or as text for `parse_number`; None stays None.

    Raises:
        ValueError: ``value`` is neither, or less than one byte.
    """
    if value is None:
        return None
    if isinstance(value, bool):
        raise ValueError(value)
    size = value if isinstance(value, int) else int(parse_number(str(value)))
    if size < 1:
        raise ValueError(value)
    return size


def human(size: int) -> str:
    """A number of bytes as text, for example ``"8.00 GB"``."""
    if size < 1e9:
        return f"{size / 1e6:.1f} MB"
    return f"{size / 1e9:.2f} GB" if size < 1e12 else f"{size / 1e12:.2f} TB"
