"""What ``compute_loss`` does to a trainer's own attributes: counters, flags, the last or best loss.

A probe is one of several calls of ``compute_loss`` for one micro-batch. Each begins with the attributes that the call
of ``training_step`` found, and puts them back when it ends; what the last one has left counts, once. Nothing is
touched that ``compute_loss`` has not changed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

#: Types of the values that are followed. Objects are not: a model that is loaded at its first use is loaded once.
PLAIN = frozenset({int, float, bool, str, type(None)})

_MISSING = object()


class Attributes:
    """The plain values among an object's attributes, as they are now.

    Args:
        owner: the trainer.
    """

    def __init__(self, owner: Any):
        own = vars(owner)
        self.names = frozenset(own)
        self.values = {name: value for name, value in own.items() if type(value) in PLAIN}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Attributes) and not self.changes(other) and not other.changes(self)

    def put(self, owner: Any) -> None:
        """Gives the object these values again; an object in place of one of them stays."""
        own = vars(owner)
        for name in [name for name, value in own.items() if type(value) in PLAIN and name not in self.names]:
            del own[name]
        for name, value in self.values.items():
            if type(own.get(name)) in PLAIN:
                own[name] = value

    def changes(self, later: Attributes) -> dict[str, tuple[Any, Any]]:
        """What has another plain value later, with the two values."""
        return {
            name: (start, end)
            for name, end in later.values.items()
            if (start := self.values.get(name, _MISSING if name not in self.names else end)) is not end
            and not _same(start, end)
        }


def only_counts(before: Attributes, after: Attributes) -> bool:
    """Whether all that has changed are integers, which are taken for counters: their differences can be added up."""
    return all(type(start) is type(end) is int for start, end in before.changes(after).values())


def take_over(owner: Any, calls: Iterable[tuple[Attributes, Attributes]]) -> None:
    """Lets the object have gone through calls, each given by what it had before and after.

    The end counts where the value is still that of the beginning. Micro-batches that are measured together all begin
    with the same number, and the differences of counters add up.
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
