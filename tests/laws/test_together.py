"""Law: passes that wait for each other give what they give one after another, in whatever order a launch does them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from zo_core.noise import Direction, Rademacher, changes
from zo_core.noise.changes import Change, Pass, flush, together
from zo_core.noise.direction import float32

SIZE = 48


class Shuffled:
    """Kernels that do the passes of a launch in a random order."""

    def __init__(self, seed: int) -> None:
        self.random, self.launches = random.Random(seed), 0

    def supports(self, one: Pass) -> bool:
        return True

    def run(self, passes: Sequence[Pass]) -> None:
        self.launches += 1
        for one in self.random.sample(passes, len(passes)):
            one.direction.apply_eager(one.theta, one.change, one.out)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Shuffled:
    made = Shuffled(0)
    monkeypatch.setattr(changes, "fused_backend", lambda name, theta: made if name == "triton" else None)
    return made


starts = st.integers(0, SIZE - 1)
steps = st.tuples(starts, starts, st.one_of(st.none(), starts), st.integers(1, 8), st.sampled_from(["triton", "eager"]))


def play(passes: list[Any], backend: str | None) -> Tensor:
    """Passes over parts of one memory: read from one, written to another or in place, with a momentum in a third."""
    memory = torch.linspace(-1, 1, SIZE + 8)
    for index, (read, write, momentum, length, own) in enumerate(passes):
        theta, out = memory[read : read + length], memory[write : write + length]
        spans = [read, *([] if write == read else [write]), *([] if momentum is None else [momentum])]
        if any(abs(a - b) < length for at, a in enumerate(spans) for b in spans[at + 1 :]):
            continue  # no pass of ours
        by = Change("add", float32(0.9))
        if momentum is not None:
            by = Change("momentum", float32(0.9), -0.5, 0.5, memory[momentum : momentum + length])
        along = Direction(Rademacher(), str(index), ((index, 0.25),), backend=own if backend is None else backend)
        along.apply(theta, by, out)
    return memory


@given(passes=st.lists(steps, max_size=12), seed=st.integers(0, 99))
def test_the_order_within_a_launch_is_free(passes: list[Any], seed: int) -> None:
    expected = play(passes, "eager")
    with pytest.MonkeyPatch.context() as patch:
        made = Shuffled(seed)
        patch.setattr(changes, "fused_backend", lambda name, theta: made if name == "triton" else None)
        with together():
            found = play(passes, None)
    assert torch.equal(expected, found)


def along(backend: str = "triton") -> Direction:
    return Direction(Rademacher(), "weight", ((1, 0.5),), backend=backend)


def test_passes_apart_take_one_launch_and_others_one_each(kernels: Shuffled) -> None:
    slots = [torch.zeros(8) for _ in range(5)]
    with together():
        for theta in slots:
            along().add_to(theta)
        assert kernels.launches == 0
        with together():  # the outer one decides
            along().add_to(torch.zeros(8))
        assert kernels.launches == 0
    assert kernels.launches == 1
    with together():
        for _ in range(3):
            along().add_to(slots[0])
    assert kernels.launches == 4
    for theta in slots:
        along().add_to(theta)
    assert kernels.launches == 9


def test_copies_of_one_tensor_take_one_launch(kernels: Shuffled) -> None:
    theta = torch.zeros(8)
    with together():
        copies = [along().scaled(side).add_to(theta, out=torch.empty(8)) for side in (1.0, -1.0)]
    assert kernels.launches == 1
    assert torch.equal(copies[0], -copies[1])


def test_what_waits_is_done_before_other_code_and_after_an_error(kernels: Shuffled) -> None:
    theta, wanted = torch.zeros(8), along("eager").add_to(torch.zeros(8))

    def fail() -> None:
        with together():
            along().add_to(theta)
            flush()
            assert torch.equal(theta, wanted)
            theta.zero_()
            along().add_to(theta)
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert torch.equal(theta, wanted)
    replace(along(), backend="eager").add_to(theta)
    assert kernels.launches == 2
