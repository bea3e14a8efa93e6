"""Law: closures in lockstep run one at a time, in turns, each in the caller's own surroundings."""

from __future__ import annotations

import contextvars
import gc
import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from zo_core.streaming.lockstep import Lockstep

VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("VARIABLE", default="unset")


def quiet() -> Lockstep:
    return Lockstep(lambda index: None, lambda index: None)


def test_closures_hand_over_to_one_that_is_behind_and_those_that_end_early_are_passed_over() -> None:
    lockstep, seen = quiet(), []

    def closure(name: str, stops: int) -> str:
        for stop in range(stops):
            seen.append(f"{name}{stop}")
            lockstep.rendezvous()
        return name

    results = lockstep.run([lambda: closure("a", 3), lambda: closure("b", 1), lambda: closure("c", 2)])
    assert results == ["a", "b", "c"]
    assert seen == ["a0", "b0", "c0", "c1", "a1", "a2"]


def test_the_last_closure_at_a_place_is_the_first_to_go_on() -> None:
    lockstep, seen = quiet(), []

    def closure(name: str) -> None:
        for stop in range(3):
            seen.append(f"{name}{stop}")
            lockstep.rendezvous()

    lockstep.run([lambda: closure("a"), lambda: closure("b")])
    assert seen == ["a0", "b0", "b1", "a1", "a2", "b2"]


def test_the_switches_surround_every_turn() -> None:
    calls: list[str] = []
    lockstep = Lockstep(lambda i: calls.append(f"-{i}"), lambda i: calls.append(f"+{i}"))
    lockstep.run([lockstep.rendezvous, lockstep.rendezvous])
    assert calls == ["+0", "-0", "+1", "-1", "+0", "-0"]


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_exception_in_any_closure_surfaces_and_the_others_unwind(failing: int) -> None:
    lockstep, unwound = quiet(), []

    def closure(index: int) -> None:
        try:
            lockstep.rendezvous()
            if index == failing:
                raise ZeroDivisionError("mine")
            lockstep.rendezvous()
            unwound.append(f"{index} went on")
        finally:
            unwound.append(index)

    with pytest.raises(ZeroDivisionError, match="mine"):
        lockstep.run([lambda i=i: closure(i) for i in range(3)])
    assert sorted(unwound) == [0, 1, 2]
    assert lockstep.run([lambda: "works again"]) == ["works again"]


def test_grad_mode_autocast_and_context_variables_are_the_callers() -> None:
    def look() -> tuple[object, ...]:
        return (
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            VARIABLE.get(),
        )

    token = VARIABLE.set("set")
    try:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            inside = quiet().run([look, look])
    finally:
        VARIABLE.reset(token)
    assert inside == [(False, True, torch.bfloat16, "set")] * 2
    assert quiet().run([look]) == [look()]


@pytest.fixture
def restored_arithmetic() -> Iterator[None]:
    """`known_start` puts the number of threads back; this does so for denormals."""
    yield
    torch.set_flush_denormal(False)


def flushes_denormals() -> bool:
    return (torch.tensor([1e-40]) * 1.0).item() == 0.0


def test_threads_compute_as_the_caller_does_also_when_that_changes(restored_arithmetic: None) -> None:
    lockstep = quiet()
    for threads, flushing in ((1, False), (2, True), (1, False)):
        torch.set_num_threads(threads)
        torch.set_flush_denormal(flushing)
        assert lockstep.run([torch.get_num_threads, flushes_denormals]) == [threads, flushes_denormals()]


def test_a_matrix_product_that_comes_first_has_no_more_threads_than_the_caller_allows() -> None:
    """Nothing has told a new thread the number by then, and two threads round the product otherwise than one."""

    def products() -> list[Tensor]:
        return [a @ b for a, b in factors]

    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 64, 128), (8, 10000, 8), (16, 1024, 16), (64, 4096, 64), (256, 256, 256)]
    factors = [
        (torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator).t()) for m, k, n in shapes
    ]
    expected = {}
    for threads in (2, 1):
        torch.set_num_threads(threads)
        expected[threads] = products()
    if all(map(torch.equal, expected[1], expected[2])):
        pytest.skip("on this processor two threads round these products as one does")
    for threads in (1, 2):  # one of them is not what a new thread begins with
        torch.set_num_threads(threads)
        assert all(map(torch.equal, quiet().run([products])[0], expected[threads]))


def test_threads_end_with_their_owner() -> None:
    lockstep = quiet()
    lockstep.run([lambda: None] * 3)
    workers = list(lockstep.workers)
    assert [worker.is_alive() for worker in workers] == [True] * 3
    del lockstep
    gc.collect()
    for worker in workers:
        worker.join(10)
    assert [worker.is_alive() for worker in workers] == [False] * 3


def test_ctrl_c_reaches_the_caller_after_the_closures_have_unwound() -> None:
    lockstep, unwound = quiet(), []

    def closure(interrupts: bool) -> None:
        try:
            if interrupts:
                os.kill(os.getpid(), signal.SIGINT)  # Python delivers it to the main thread, which is waiting
            for _ in range(1000):
                lockstep.rendezvous()
                time.sleep(0.01)
        finally:
            unwound.append(interrupts)

    found = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            lockstep.run([lambda: closure(True), lambda: closure(False)])
    finally:
        signal.signal(signal.SIGINT, found)
    assert True in unwound
    assert lockstep.live == []  # the other one has unwound too, or never began
    assert lockstep.run([lambda: "works again"]) == ["works again"]
