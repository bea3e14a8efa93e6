"""Law: a checkpoint that does not fit is refused as a whole, with what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import closure, tiny
from test_errors import says
from traces import left_as_found, same_bits, weights

from zo_core import (
    StateError,
    StepRecord,
    ZeroOrder,
)

# Checkpoints


def good_state(steps: int = 2) -> dict[str, Any]:
    model = tiny("mlp")
    zo = ZeroOrder(model, lr=1e-3, rule="momentum", seed=5)
    for _ in range(steps):
        zo.step(closure("mlp", model))
    return zo.state_dict()


def without(state: dict[str, Any], *path: Any) -> dict[str, Any]:
    inner = state
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return state


def changed(state: dict[str, Any], value: Any, *path: Any) -> dict[str, Any]:
    inner = state
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return state


DAMAGED: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "not a dict": (lambda: [1, 2], ["not a checkpoint of ZeroOrder"]),
    "nothing": (lambda: None, ["not a checkpoint of ZeroOrder"]),
    "a model's": (lambda: tiny("mlp").state_dict(), ["not a checkpoint", "step", "seed", "optimizer"]),
    "no seed": (lambda: without(good_state(), "seed"), ["seed missing"]),
    "step is text": (lambda: changed(good_state(), "3", "step"), ["damaged", "step='3'"]),
    "negative step": (lambda: changed(good_state(), -3, "step"), ["damaged", "step=-3"]),
    "seed is None": (lambda: changed(good_state(), None, "seed"), ["damaged", "seed=None"]),
    "optimizer is None": (lambda: changed(good_state(), None, "optimizer"), ["optimizer state does not fit"]),
    "no groups": (lambda: without(good_state(), "optimizer", "param_groups"), ["does not fit", "param_groups"]),
    "no state": (lambda: without(good_state(), "optimizer", "state"), ["does not fit", "state"]),
    "a group without lr": (lambda: without(good_state(), "optimizer", "param_groups", 0, "lr"), ["does not fit", "lr"]),
    "a group with eps 0": (
        lambda: changed(good_state(), 0.0, "optimizer", "param_groups", 0, "eps"),
        ["does not fit", "eps=0.0"],
    ),
    "too few parameters": (
        lambda: changed(good_state(), [0, 1], "optimizer", "param_groups", 0, "params"),
        ["does not fit", "size"],
    ),
    "momentum of another shape": (
        lambda: changed(good_state(), torch.zeros(7), "optimizer", "state", 1, "momentum"),
        ["does not fit", "momentum", "[7]", "[16]"],
    ),
    "another optimizer's": (
        lambda: changed(good_state(), torch.optim.SGD(tiny("mlp").parameters()).state_dict(), "optimizer"),
        ["written by SGD", "load them into the model", "optimizer=..."],
    ),
    "only another optimizer's": (
        lambda: torch.optim.AdamW(tiny("mlp").parameters()).state_dict(),
        ["not a checkpoint of ZeroOrder", "the state of an optimizer, AdamW"],
    ),
    "a newer version's": (
        lambda: changed(good_state(), 99, "optimizer", "zo", "version"),
        ["a newer version", "99", "update zo-trainer"],
    ),
    "a mark that is none": (lambda: changed(good_state(), 7, "optimizer", "zo"), ["damaged", "its mark is 7"]),
}


@pytest.mark.parametrize("damage", list(DAMAGED))
def test_a_checkpoint_that_does_not_fit_is_refused_whole(damage: str) -> None:
    build, words = DAMAGED[damage]
    model, twin = tiny("mlp"), tiny("mlp")
    zo, other = (ZeroOrder(m, lr=0.1, rule="momentum", seed=5) for m in (model, twin))
    for z in (zo, other):
        z.step(closure("mlp", z.model))
    with left_as_found(model), pytest.raises(StateError) as caught:
        zo.load_state_dict(build())
    says(caught.value, *words)
    # The run goes on as if nothing had been tried.
    found, expected = (z.step(closure("mlp", z.model)) for z in (zo, other))
    assert isinstance(found, StepRecord)
    assert found.as_dict() == expected.as_dict()
    assert same_bits(weights(model), weights(twin))


def test_a_whole_checkpoint_is_accepted() -> None:
    """Or the test above would pass for the wrong reason."""
    zo = ZeroOrder(tiny("mlp"), rule="momentum")
    zo.load_state_dict(good_state())
    assert (zo.step_count, zo.seed) == (2, 5)
