"""What a forward may change besides the trained weights: buffers, and what modules keep as attributes.

Examples are a running centre, a queue of negatives, a counter, a momentum encoder. The next probe must not see what
one probe's forward does to them, and a step leaves what one forward leaves. So all probes of a step start from the same
state, as they do with the state of the random generators. Tensors are compared by memory and version, so nothing is
copied while nothing changes.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from .stand_ins import same_bits

logger = logging.getLogger(__name__)

#: Attributes that every module has; `modes` takes care of the ``training`` flags.
INTERNAL = frozenset(vars(nn.Module()))

#: The dicts with the hooks of a module.
HOOKS = tuple(name for name in sorted(INTERNAL) if "forward" in name and "hooks" in name)

_hooks_of = itemgetter(*HOOKS)

#: Containers whose entries are followed, up to `MAX_ENTRIES` of them.
CONTAINERS = frozenset({list, dict, set, deque, OrderedDict, defaultdict, Counter})
MAX_ENTRIES = 1 << 12

#: Bytes that are copied in advance, smallest tensors first; other tensors are copied once they have changed.
IN_ADVANCE = 64 << 20

#: State outside of the model: a function that gets it, and one that sets it.
Carried = tuple[Callable[[], Any], Callable[[Any], object]]

_MISSING = object()


class _Part:
    """Something that a forward may change.

    Attributes:
        name: for messages.
        start: what it was when the step began.
    """

    name: str
    start: Any

    @property
    def key(self) -> tuple[int, str]:
        """Identifies the part."""
        raise NotImplementedError

    def take(self) -> Any:
        """The current value, for `put`."""
        raise NotImplementedError

    def put(self, value: Any) -> None:
        """Puts back what `take` returned."""
        raise NotImplementedError

    def found(self) -> list[Any]:
        """The objects that it currently consists of."""
        raise NotImplementedError


class _Entry(_Part):
    """An attribute or a buffer: a place in the dict of a module."""

    def __init__(self, owner: dict[str, Any], name: str, start: Any):
        self.owner, self.name, self.start = owner, name, start

    @property
    def key(self) -> tuple[int, str]:
        return id(self.owner), self.name

    def take(self) -> Any:
        return self.owner.get(self.name, _MISSING)

    def found(self) -> list[Any]:
        return [self.take()]

    def put(self, value: Any) -> None:
        if value is _MISSING:
            self.owner.pop(self.name, None)
        else:
            self.owner[self.name] = value


class _Contents(_Part):
    """The entries of a list, dict, set or deque that a module has as an attribute."""

    def __init__(self, name: str, container: Any):
        self.name, self.container, self.start = name, container, container.copy()

    @property
    def key(self) -> tuple[int, str]:
        return id(self.container), self.name

    @property
    def moved(self) -> bool:
        now, start = self.container, self.start
        if len(now) != len(start):
            return True
        if isinstance(now, set):
            return bool(now != start)
        return not all(a is b for a, b in zip(_entries(now), _entries(start), strict=True))

    def take(self) -> Any:
        return self.container.copy()

    def found(self) -> list[Any]:
        return list(_entries(self.container))

    def put(self, value: Any) -> None:
        self.container.clear()
        (self.container.update if isinstance(value, (dict, set)) else self.container.extend)(value)


class _Values(_Part):
    """The values of a tensor that is not a trained weight."""

    def __init__(self, name: str, tensor: Tensor, copied: bool):
        self.name, self.tensor, self.silent, self.lost = name, tensor, False, False
        self.start: tuple[Tensor, Tensor | None]
        self.begin(copied)

    def begin(self, copied: bool) -> None:
        """Records the current values as those to restore."""
        self.lost = False
        self.pointer, self.version = self.tensor.data_ptr(), self.tensor._version
        self.start = self.tensor.data, self.tensor.data.clone() if copied else None

    @property
    def key(self) -> tuple[int, str]:
        return id(self.tensor), ""

    @property
    def moved(self) -> bool:
        if self.tensor._version != self.version or self.tensor.data_ptr() != self.pointer:
            return True
        return self.silent and self.differs

    @property
    def differs(self) -> bool:
        """Whether the bits of the values have changed; False if there is no copy to compare with."""
        copy = self.start[1]
        return copy is not None and not same_bits(self.tensor, copy)

    def take(self) -> tuple[Tensor, Tensor | None]:
        return self.tensor.data, self.tensor.data.clone()

    def found(self) -> list[Any]:
        return [self.tensor]

    def put(self, value: tuple[Tensor, Tensor | None]) -> None:
        memory, copy = value
        if memory.data_ptr() != self.tensor.data_ptr():
            self.tensor.data = memory
        if copy is not None:
            memory.copy_(copy)


class ForwardState:
    """The state of a model that the probes of a step start from, and how each of them changes it.

    Args:
        model: the module whose forwards are measured.
        moving: tensors that probes and streaming point at other memory, by ``id``.
        carried: further state that closures may change, outside of the model.
    """

    def __init__(self, model: nn.Module, moving: Collection[int], carried: Sequence[Carried] = ()):
        self.model, self.moving, self.carried = model, frozenset(moving), carried
        self.beside: list[Any] = []
        self.places: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.contents: list[_Contents] = []
        self.values: dict[int, _Values] = {}
        self.hooks: list[dict[Any, Any]] = []
        self.count = 0
        #: Number of hooks that an oracle has registered on the modules since `begin`.
        self.own_hooks = 0
        self._looked_closely = False
        #: What changed from one `begin` of a step to the next, with the values at the former; None before the first.
        self._earlier: list[tuple[list[tuple[_Part, Any]], list[Any]]] | None = None
        #: What differs between probes that take turns, by key.
        self.shared: dict[tuple[int, str], _Part] = {}

    def begin(self, known_to_change: Collection[int] = ()) -> None:
        """Records the current state as the one that every probe starts from.

        Args:
            known_to_change: tensors that are copied in advance whatever their size, by ``id``.
        """
        if self._earlier is None:
            self._earlier = []
        else:
            with torch.no_grad(), torch.DisableTorchFunction():
                self._earlier.append(([(part, part.start) for part in self.changed()], self.beside))
        self.beside = self._beside()
        self.places, self.contents, self.hooks = [], [], []
        before, self.values = self.values, {}
        found: dict[int, tuple[str, Tensor]] = {}
        moving = self.moving
        for path, module in self.model.named_modules():
            own = vars(module)
            self.hooks += _hooks_of(own)
            self._remember(path, own, {k: v for k, v in own.items() if k not in INTERNAL}, found)
            if module._buffers:
                self._remember(path, module._buffers, dict(module._buffers), found)
            for name, parameter in module._parameters.items():
                if id(parameter) not in moving and parameter is not None and _is_followed(parameter):
                    found[id(parameter)] = f"{path}.{name}", parameter
        self.count = self._hooked()
        room = IN_ADVANCE
        for name, tensor in sorted(found.values(), key=lambda one: _nbytes(one[1])):
            known = before.get(id(tensor))
            weight = isinstance(tensor, nn.Parameter)
            room -= 0 if weight else _nbytes(tensor)
            if known is None or known.tensor is not tensor:
                known = _Values(name, tensor, copied=(room >= 0 and not weight) or id(tensor) in known_to_change)
            elif known.moved or known.lost:
                known.begin(copied=True)
            self.values[id(tensor)] = known
        self._begin_shared()

    def _remember(
        self, path: str, owner: dict[str, Any], values: dict[str, Any], found: dict[int, tuple[str, Tensor]]
    ) -> None:
        self.places.append((owner, values))
        for name, value in values.items():
            if isinstance(value, Tensor):
                entries = [value]
            elif type(value) in CONTAINERS and len(value) <= MAX_ENTRIES:
                self.contents.append(_Contents(f"{path}.{name}", value))
                entries = [entry for entry in _entries(value) if isinstance(entry, Tensor)]
            else:
                continue
            for tensor in entries:
                known = isinstance(tensor, nn.Parameter) or id(tensor) in self.moving
                if not known and _is_followed(tensor):
                    found[id(tensor)] = f"{path}.{name}", tensor

    def changed(self) -> list[_Part]:
        """What differs from the state that `begin` recorded."""
        parts: list[_Part] = []
        # A forward that installs hooks sets up the model for all later ones, and records that in an attribute.
        sets_up = self._hooked() != self.count + self.own_hooks
        for owner, start in self.places:
            if sets_up and owner.keys() >= INTERNAL:
                continue
            names = owner.keys() - INTERNAL
            if len(names) == len(start) and all(owner[name] is start.get(name, _MISSING) for name in names):
                continue  # as usual, for hundreds of modules at every step
            for name in names:
                if start.get(name, _MISSING) is not owner[name]:
                    parts.append(_Entry(owner, name, start.get(name, _MISSING)))
            parts += [_Entry(owner, name, value) for name, value in start.items() if name not in owner]
        parts += [part for part in self.contents if part.moved]
        if not self._looked_closely:  # writing through ``.data`` does not change the version
            self._looked_closely = True
            for part in self.values.values():
                part.silent = not part.moved and part.differs
        parts += [part for part in self.values.values() if part.moved]
        return parts

    @property
    def moved(self) -> bool:
        """Whether anything differs from the state that `begin` recorded."""
        with torch.no_grad(), torch.DisableTorchFunction():
            return bool(self.changed()) or self.beside_changed

    @property
    def copied(self) -> set[int]:
        """The tensors of which there are copies, by ``id``."""
        return {key for key, part in self.values.items() if part.start[1] is not None or part.moved}

    def _hooked(self) -> int:
        return sum(map(len, self.hooks))

    def note_own_hooks(self) -> None:
        """Counts the hooks since `begin` as those of an oracle, which removes them again."""
        self.own_hooks = self._hooked() - self.count

    def around_hooks(self, change: Callable[[], None]) -> None:
        """Runs what adds hooks of an oracle to modules or removes them, and counts these as the oracle's."""
        before = self._hooked()
        change()
        self.own_hooks += self._hooked() - before

    def rewind(self) -> bool:
        """Restores the state that `begin` recorded.

        Returns:
            Whether anything of the model had changed.
        """
        self._put_beside(self.beside)
        with torch.no_grad(), torch.DisableTorchFunction():
            parts = self.changed()
            for part in parts:
                part.put(part.start)
                if isinstance(part, _Values):
                    if part.start[1] is None and part.tensor.data_ptr() == part.pointer:
                        part.lost = True
                        logger.warning(
                            "%s was written by a forward for the first time, and is too large to keep a copy of it in "
                            "advance: this step's probes see it change; from the next step on they do not",
                            part.name.lstrip("."),
                        )
                    part.version = part.tensor._version
        return bool(parts)

    def begin_step(self) -> None:
        """Makes the next `begin` the one that `rewind_step` goes back to."""
        self._earlier = None

    def rewind_step(self) -> None:
        """Restores the state that the first `begin` of the step recorded, before all of its micro-batches."""
        self.rewind()
        with torch.no_grad(), torch.DisableTorchFunction():
            for parts, beside in reversed(self._earlier or []):
                for part, start in parts:
                    part.put(start)
                    if isinstance(part, _Values):
                        part.lost = True  # its copy is that of the last micro-batch
                self._put_beside(beside)
        self._earlier = None

    # Probes that take turns

    def share(self) -> bool:
        """Records what a sweep has changed, so that `get` and `put` keep it separate for each probe.

        Returns:
            Whether anything was new; in that case the probes have seen each other's state.
        """
        with torch.DisableTorchFunction():
            found: dict[tuple[int, str], _Part] = {part.key: part for part in self.changed()}
        new = found.keys() - self.shared.keys()
        self.shared.update(found)
        return bool(new)

    def _begin_shared(self) -> None:
        places = {id(owner): (owner, start) for owner, start in self.places}
        now: dict[tuple[int, str], _Part] = {part.key: part for part in (*self.contents, *self.values.values())}
        shared: dict[tuple[int, str], _Part] = {}
        for key, part in self.shared.items():
            if isinstance(part, _Entry):
                if key[0] in places:
                    owner, start = places[key[0]]
                    shared[key] = _Entry(owner, key[1], start.get(key[1], _MISSING))
            elif key in now:
                shared[key] = now[key]
        self.shared = shared

    def get(self) -> tuple[list[tuple[_Part, Any]], list[Any]]:
        """The state as the running probe has changed it."""
        if not self.shared:  # as usual, and probes take turns often
            return [], self._beside()
        with torch.no_grad(), torch.DisableTorchFunction():
            return [(part, part.take()) for part in self.shared.values()], self._beside()

    def put(self, state: tuple[list[tuple[_Part, Any]], list[Any]]) -> None:
        """Puts back what `get` returned."""
        parts, beside = state
        if parts:
            with torch.no_grad(), torch.DisableTorchFunction():
                for part, value in parts:
                    part.put(value)
        self._put_beside(beside)

    @property
    def beside_changed(self) -> bool:
        """Whether the state outside of the model differs from that which `begin` recorded."""
        return self.beside != self._beside()

    def _beside(self) -> list[Any]:
        return [get() for get, _ in self.carried]

    def _put_beside(self, values: list[Any]) -> None:
        for (_, put), value in zip(self.carried, values, strict=False):  # more may be carried from the next step on
            put(value)


def _entries(container: Any) -> Iterator[Any]:
    """Everything in a container, the keys of a dict included."""
    if isinstance(container, dict):
        for pair in container.items():
            yield from pair
    else:
        yield from container


def _is_followed(tensor: Tensor) -> bool:
    """Whether a tensor has memory and a version of its own."""
    plain = type(tensor) in (Tensor, nn.Parameter)
    return plain and tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_inference())


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
