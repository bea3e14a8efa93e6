"""Law: PyTorch's sanitizer for CUDA finds no race in the lives of streamed models, and finds those that are made."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from race_scenarios import LIVES, OTHERS, live, whole_life

from zo_core.streaming.copies import Copies

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: none is available"),
]


@pytest.fixture
def sanitizer() -> Iterator[Any]:
    """The sanitizer, with empty books: it does not know that a device which is idle has no races."""
    from torch.cuda import _sanitizer

    torch.cuda.synchronize()
    checker = _sanitizer.cuda_sanitizer
    handler = checker.dispatch.event_handler
    handler.tensors_accessed.accesses.clear()
    launch, lock = type(handler)._handle_kernel_launch, threading.Lock()
    launches = []

    def one_at_a_time(*args: Any) -> Any:  # the thread of copies launches, too, and the sanitizer has no lock
        with lock:
            launches.append(args[0])
            return launch(handler, *args)

    handler._handle_kernel_launch = one_at_a_time
    checker.enable()
    yield launches
    checker.disable()
    del handler._handle_kernel_launch
    torch.cuda.synchronize()


@pytest.mark.parametrize("life", [LIVES[1], LIVES[3], LIVES[7]], ids=str)
def test_a_life_without_races(life: tuple[str, str, str, int], sanitizer: list[int]) -> None:
    live(*life, "cuda", backend="eager")  # every kernel is seen
    assert len(set(sanitizer)) >= 3  # computation and copies both ways


@pytest.mark.parametrize("name", OTHERS)
def test_other_ways_to_live_without_races(name: str, sanitizer: list[int]) -> None:
    OTHERS[name]("cuda")
    assert len(set(sanitizer)) >= 3


@pytest.mark.parametrize("left_out", ["let_wait", "now"])
def test_orders_that_are_left_out_are_noticed(left_out: str, sanitizer: list[int], monkeypatch: Any) -> None:
    """Computing before the copy is there, or copying into memory that is in use."""
    from torch.cuda._sanitizer import CUDASanitizerErrors

    without = {"let_wait": lambda self, copy: copy.result(), "now": lambda self: torch.cuda.Event()}[left_out]
    monkeypatch.setattr(Copies, left_out, without)
    with pytest.raises(CUDASanitizerErrors):
        whole_life("cuda", 4, rule="momentum", backend="eager")
