"""Laws of one shared block: the order of what two users do, forks, faults, and what the driver knows of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from zo_core import RanksError, StateError
from zo_core.streaming import board
from zo_core.streaming.board import Board, mapped_memory, new_memory, open_memory
from zo_core.streaming.shared import SharedStore
from zo_core.streaming.store import RamStore

State = dict[str, Tensor]


def board_of(size: int = 2, blocks: int = 2) -> list[Board]:
    file, _ = new_memory("test", Board.size(size, blocks))
    found = [Board(open_memory(os.getpid(), file), rank, size, blocks) for rank in range(size)]
    os.close(file)
    return found


@pytest.fixture
def pair() -> tuple[SharedStore, SharedStore]:
    """Two users of one block, in one process, so that a test can choose the order of what they do."""
    layout = {"weight": (torch.Size([3]), torch.float32)}
    file, _ = new_memory("test", 4096)
    stores = []
    for board_ in board_of():
        common = RamStore()
        common.place("a", mapped_memory(os.getpid(), file), layout)
        stores.append(SharedStore(RamStore(), common, board_, {"a": 0}))
    os.close(file)
    return stores[0], stores[1]


def queue(store: SharedStore, pending: list[Any], update: Callable[[State], Any]) -> None:
    pending.append((("weight",), update))
    store.queued("a", pending)


def visit(store: SharedStore, pending: list[Any]) -> Tensor:
    """Fetches the block, applies what is due, and offers the result."""
    values = {"weight": torch.full((3,), -1.0)}
    store.read("a", values)
    due = store.due("a", pending)
    for _, update in due:
        update(values)
    store.note_applied("a", pending)
    store.write("a", values, {"weight"})
    return values["weight"]


def test_values_are_never_ahead_of_a_living_process(pair: tuple[SharedStore, SharedStore]) -> None:
    (first, second), one, two = pair, [], []  # type: ignore[var-annotated]

    def add(values: State) -> None:
        values["weight"] += 1

    for number in (1.0, 2.0):
        queue(first, one, add)
        assert visit(first, one).tolist() == [number] * 3
    assert visit(second, two).tolist() == [0.0] * 3  # nothing was stored
    assert not first.common.whole("a")["weight"].any()
    queue(second, two, add)
    assert visit(second, two).tolist() == [1.0] * 3
    assert first.common.whole("a")["weight"].tolist() == [1.0] * 3
    assert visit(first, one).tolist() == [2.0] * 3
    assert len(one) == 1  # the one that the other has stored is not needed any more
    second.leave()
    assert visit(first, one).tolist() == [2.0] * 3
    assert first.common.whole("a")["weight"].tolist() == [2.0] * 3
    assert first.complete("a", one)
    assert not one


def test_a_process_that_does_not_come_to_the_same_step_is_an_error(
    pair: tuple[SharedStore, SharedStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(board, "PATIENCE", 0.05)
    pending: list[Any] = []
    queue(pair[0], pending, lambda _: None)
    visit(pair[0], pending)
    with pytest.raises(RanksError, match="process 1 of this host has not come to the same step"):
        pair[0].complete("a", pending)


def test_a_fork_that_ends_leaves_the_locks_of_its_parent(pair: tuple[SharedStore, SharedStore]) -> None:
    first, second = pair
    if not (child := os.fork()):
        first.leave()  # as at the end of the interpreter
        os._exit(0)
    os.waitpid(child, 0)
    assert second.board.lives(0)
    first.leave()
    assert not second.board.lives(0)


def test_a_block_that_was_half_written_is_an_error(pair: tuple[SharedStore, SharedStore]) -> None:
    with pytest.raises(ZeroDivisionError), pair[0].board.writing(0, 1):
        raise ZeroDivisionError
    with pytest.raises(StateError, match="process 0 of this host ended while it stored a layer"):
        pair[1].read("a", {"weight": torch.zeros(3)})


def test_a_process_with_a_copy_of_its_own_leaves_the_common_one_alone(pair: tuple[SharedStore, SharedStore]) -> None:
    (first, second), pending = pair, []  # type: ignore[var-annotated]
    first.part("a", {"weight": torch.ones(3)})
    assert not first.shares("a")
    first.write("a", {"weight": torch.full((3,), 2.0)}, {"weight"})
    assert first.whole("a")["weight"].tolist() == [2.0] * 3
    queue(second, pending, lambda values: values["weight"].add_(5))
    assert visit(second, pending).tolist() == [5.0] * 3  # nobody is waited for
    assert second.whole("a")["weight"].tolist() == [5.0] * 3


def test_the_driver_knows_shared_memory_until_it_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    known: set[int] = set()

    class Driver:
        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            known.add(address)
            return 0

        def cudaHostUnregister(self, address: int) -> None:
            known.remove(address)

    monkeypatch.setattr(torch.cuda, "cudart", Driver)
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: None)
    layout = {"weight": (torch.Size([3]), torch.float32), "bias": (torch.Size([1]), torch.bfloat16)}
    file, memory = new_memory("test", 4096)
    first, second = RamStore(pinned=True), RamStore(pinned=True)
    first.put("a", {name: torch.ones(*spec[0], dtype=spec[1]) for name, spec in layout.items()})
    own = set(known)
    first.drop("a")
    assert not known
    first.place("a", memory, layout)
    second.place("a", mapped_memory(os.getpid(), file), layout)
    os.close(file)
    assert len(own) == 1
    assert len(known) == 2
    first.write("a", {name: torch.ones(*spec[0], dtype=spec[1]) for name, spec in layout.items()}, layout.keys())
    into = {name: torch.zeros(*spec[0], dtype=spec[1]) for name, spec in layout.items()}
    second.read("a", into)
    assert all(tensor.eq(1).all() for tensor in into.values())
    del first, second
    assert not known
