"""Changes that ``compute_loss`` makes to a trainer's own attributes: counters, flags, the last or best loss.

A probe is one of several calls of ``compute_loss`` for one micro-batch. Each starts from the attributes at the call
in ``training_step``, and restores them when it ends. The changes of the last probe are then applied, once. Attributes
that ``compute_loss`` has not changed are left alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

#: Types of the values that are tracked. Objects are not: a model that is loaded at its first use is loaded once.
PLAIN = frozenset({int, float, bool, str, type(None)})

_MISSING = object()


class Attributes:
    """A snapshot of the plain values among an object's attributes.

    Args:
        owner: the object, a trainer.
    """

    def __init__(self, owner: Any):
        own = vars(owner)
        self.names = frozenset(own)
        self.values = {name: value for name, value in own.items() if type(value) in PLAIN}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Attributes) and not self.changes(other) and not other.changes(self)

    def put(self, owner: Any) -> None:
        """Restores these values on ``owner``; an attribute that is now an object stays."""
        own = vars(owner)
        for name in [name for name, value in own.items() if type(value) in PLAIN and name not in self.names]:
            del own[name]
        for name, value in self.values.items():
            if type(own.get(name)) in PLAIN:
                own[name] = value

    def changes(self, later: Attributes) -> dict[str, tuple[Any, Any]]:
        """Returns the attributes with another plain value in ``later``, with both values."""
        return {
            name: (start, end)
            for name, end in later.values.items()
            if (start := self.values.get(name, _MISSING if name not in self.names else end)) is not end
            and not _same(start, end)
        }


def only_counts(before: Attributes, after: Attributes) -> bool:
    """Whether only integers have changed. They are assumed to be counters, whose differences can be added up."""
    return all(type(start) is type(end) is int for start, end in before.changes(after).values())


def take_over(owner: Any, calls: Iterable[tuple[Attributes, Attributes]]) -> None:
    """Applies the changes of some calls to the object.

    Each changed value is set to its value after the call. Integers are counters: micro-batches that are measured
    together all start from one number, so the differences are added up.

    Args:
        owner: the object, changed in place.
        calls: the attributes before and after each call.
    """
    own = vars(owner)
    for before, after in calls:
        for name, (start, end) in before.changes(after).items():
            now = own.get(name, _MISSING)
            counter = type(now) is type(start) is type(end) is int
            own[name] = now + (end - start) if counter else end
        for name in before.values.keys() - after.names:
            own.pop(name, None)


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and bool(one == other or (one != one and other != other))
