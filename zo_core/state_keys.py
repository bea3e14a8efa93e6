"""Which parameter a state belongs to: the keys of an optimizer's tensors, since a checkpoint numbers them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from .errors import StateError
from .targets import Slot, as_it_lies, held, slot_keys


@as_it_lies
def keys_of(model: nn.Module, slots: Iterable[Slot], groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys of all tensors that an optimizer holds, in its order; none if some are not of the model.

    They are those of the slots. If some tensors are frozen, they are names of parameters, which say the same: what all
    of them begin with is left out, and so is what wrappers add.

    Args:
        model: the module that is trained.
        slots: those of its engine.
        groups: the groups of the optimizer.
    """
    ids = [id(tensor) for group in groups for tensor in group["params"]]
    names = {id(tensor): slot.key for slot in slots for tensor in slot.tensors}
    wanted = set(ids)
    if not names.keys() >= wanted:
        names = {id(held(parameter)): name for name, parameter in model.named_parameters()}
    ordered = [each for each in names if each in wanted]
    keys = dict(zip(ordered, slot_keys(names[each] for each in ordered), strict=True))
    return [keys[each] for each in ids] if len(keys) == len(ids) else []


def in_order(
    state: dict[str, Any],
    known: Mapping[int, str],
    keys: Sequence[str],
    groups: Sequence[Mapping[str, Any]],
    otherwise: str,
) -> dict[str, Any]:
    """A state that is loaded, with the parameters of each group in the order of this run.

    Args:
        state: of an optimizer; it is returned as it is if either side has no keys.
        known: its keys, by index.
        keys: those of this run, as `keys_of` returns them.
        groups: those of the optimizer that loads it.
        otherwise: what else to do, for the error.

    Raises:
        StateError: a group is of other parameters.
    """
    if not known or not keys or _sizes(groups) != _sizes(state["param_groups"]):
        return state  # a wrong count has an error of its own
    ordered, rest = [], iter(keys)
    for number, group in enumerate(state["param_groups"]):
        theirs = {known.get(index, ""): index for index in group["params"]}
        mine = [next(rest) for _ in group["params"]]
        if lacking := [key for key in mine if key not in theirs]:
            raise StateError(
                f"group {number} of this checkpoint's optimizer holds {_some([k for k in theirs if k not in mine])}, "
                f"and that of this run {_some(lacking)}; make the model and the groups as they were, or {otherwise}"
            )
        ordered.append({**group, "params": [theirs[key] for key in mine]})
    return {**state, "param_groups": ordered}


def _sizes(groups: Sequence[Mapping[str, Any]]) -> list[int]:
    return [len(group["params"]) for group in groups]


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
