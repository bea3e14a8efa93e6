"""Checks of what a seed log says. It may come from a stranger, who can make every checksum right.

Whatever passes has the types that the rest of this package relies on, so a log can be a wrong one, and then
the comparison with the model shows it, but it cannot make other code fail.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from typing import Any

#: More than the header of any real log, and little memory: a few bytes can inflate to gigabytes.
MAX_HEADER = 256 << 20
#: More directions than a step can have in practice.
MAX_PROBES = 1 << 20

Check = Callable[[Any], bool]


def unpacked(payload: bytes, *, deflated: bool) -> dict[str, Any]:
    """Decodes a JSON object.

    Raises:
        ValueError: it is none; the message tells why.
    """
    try:
        if deflated:
            stream = zlib.decompressobj()
            payload = stream.decompress(payload, MAX_HEADER)
            if not stream.eof:
                raise ValueError(f"it is cut off, or larger than {MAX_HEADER:,} bytes")
        found = json.loads(payload)
    except (zlib.error, RecursionError) as error:
        raise ValueError(str(error)) from error
    if not isinstance(found, dict):
        raise ValueError(f"a JSON object is expected, and a {type(found).__name__} came")
    return found


def check_header(header: dict[str, Any]) -> None:
    """Checks the header of a log; entries that this version does not know may be anything.

    Raises:
        ValueError: an entry is missing, or is not of its kind.
    """
    for key, (check, wanted) in {**REQUIRED, **OPTIONAL}.items():
        if key in header:
            _demand(check(header[key]), key, header[key], wanted)
        elif key in REQUIRED:
            raise ValueError(f"there is no {key!r}")
    base = header["base"]
    _demand(isinstance(base.get("slots"), dict) and bool(base["slots"]), "base.slots", base, "the trained tensors")
    for key, slot in base["slots"].items():
        _demand(_is_text(key) and _is_slot(slot), "base.slots", key, "a shape, a dtype and a digest for each name")
    frozen = base.get("frozen")
    counted = isinstance(frozen, list) and len(frozen) == 2 and _is_count(frozen[0]) and _is_text(frozen[1])
    _demand(counted, "base.frozen", frozen, "a number of tensors and a digest")
    _demand(_is_text(base.get("digest")), "base.digest", base.get("digest"), "a digest")
    check_settings(header["settings"], len(base["slots"]))
    _demand(_is_number(header.get("factor", 1.0)), "factor", header.get("factor"), "a number")
    state = header.get("normaliser")
    if state is not None:
        known = _is_text(state.get("name")) and _is_number(state.get("mean_square")) and _is_count(state.get("count"))
        _demand(known, "normaliser", state, "a name, a mean square and a count")


def check_settings(values: Any, slots: int) -> None:
    """Checks the settings of an update for this number of slots.

    Raises:
        ValueError: they do not fit together.
    """
    _demand(isinstance(values, dict) and _is_whole(values.get("seed")), "settings", values, "an object with a seed")
    lists = {key: values.get(key) for key in ("group_of", "eps", "weight_decay", "columns")}
    for key, found in lists.items():
        numbers = isinstance(found, list) and all(map(_is_number, found))
        _demand(numbers, f"settings.{key}", found, "a list of numbers")
    groups = len(values["eps"])
    indexes = (("group_of", slots), ("columns", groups))
    fit = groups > 0 and len(values["weight_decay"]) == groups
    fit = fit and all(len(values[key]) == length for key, length in indexes)
    fit = fit and all(_is_count(index) and index < groups for key, _ in indexes for index in values[key])
    _demand(fit, "settings", lists, f"one group for each of {slots} tensors, and one value for each group")


def check_change(change: dict[str, Any], slots: int, next_step: int) -> None:
    """Checks a change-record before a step; entries that this version does not know may be anything.

    Raises:
        ValueError: an entry is not of its kind.
    """
    for key, value in change.items():
        if key == "settings":
            check_settings(value, slots)
        elif key == "next_step":
            _demand(_is_count(value) and value >= next_step, key, value, f"a step from {next_step} on")
        elif key == "rollback":
            known = isinstance(value, dict) and value.keys() == {"to", "factor"}
            known = known and _is_count(value["to"]) and _is_number(value["factor"])
            _demand(known, key, value, "a step and a factor")
        elif key in CHANGES:
            check, wanted = CHANGES[key]
            _demand(check(value), key, value, wanted)


def _demand(holds: bool, key: str, value: Any, wanted: str) -> None:
    if not holds:
        shown = repr(value)
        raise ValueError(f"{key}={shown if len(shown) < 80 else shown[:77] + '...'} must be {wanted}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 128


def _is_count(value: Any) -> bool:
    return _is_whole(value) and 0 <= value < 1 << 63


def _is_probes(value: Any) -> bool:
    return _is_count(value) and 1 <= value <= MAX_PROBES


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and abs(value) < 1e300


def _is_text(value: Any) -> bool:
    """Printable, so that showing it does nothing to a terminal."""
    return isinstance(value, str) and value.isprintable()


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_slot(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 3:
        return False
    shape, dtype, digest = value
    return isinstance(shape, list) and all(map(_is_count, shape)) and _is_text(dtype) and _is_text(digest)


def _is_component(value: Any) -> bool:
    """What a registry describes: a name, or an object with one."""
    return _is_text(value) or (isinstance(value, dict) and _is_text(value.get("name")))


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


TEXT, TEXTS = (_is_text, "printable text"), (_is_texts, "a list of printable texts")
COMPONENT, FLAG = (_is_component, "a name, or an object with one"), (_is_flag, "true or false")
PROBES, COUNT = (_is_probes, f"a number from 1 to {MAX_PROBES}"), (_is_count, "a whole number of at least 0")

REQUIRED: dict[str, tuple[Check, str]] = {
    "zo": TEXT,
    "torch": TEXT,
    "first_step": COUNT,
    "target": COMPONENT,
    "noise": COMPONENT,
    "rule": COMPONENT,
    "estimator": COMPONENT,
    "num_probes": PROBES,
    "stochastic_rounding": FLAG,
    "eps": (_is_number, "a number"),
    "clip": (lambda value: value is None or isinstance(value, float | int), "a number, or null"),
    "limits": TEXTS,
    "notes": TEXTS,
    "prefix": TEXT,
    "settings": (_is_object, "an object"),
    "base": (_is_object, "an object"),
}
OPTIONAL: dict[str, tuple[Check, str]] = {
    "own_probes": PROBES,
    "dropout": FLAG,
    "windows": FLAG,
    "maximize": FLAG,
    "scores": FLAG,
    "normaliser": (_or_none(_is_object), "an object, or null"),
}
CHANGES: dict[str, tuple[Check, str]] = {
    "rule": COMPONENT,
    "num_probes": PROBES,
    "draws": FLAG,
    "merged": FLAG,
    "failed": FLAG,
    "checkpoint": COUNT,
}
