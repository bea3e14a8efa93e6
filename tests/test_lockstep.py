"""Law: closures in lockstep run one at a time, in turns, each in the caller's own surroundings."""

from __future__ import annotations

import contextvars
import gc
import os
import signal
import time

import pytest
import torch

from zo_core.offload.lockstep import Lockstep

VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("VARIABLE", default="unset")


def quiet() -> Lockstep:
    return Lockstep(lambda index: None, lambda index: None)


def test_closures_take_turns_and_those_that_end_early_are_passed_over() -> None:
    lockstep, seen = quiet(), []

    def closure(name: str, stops: int) -> str:
        for stop in range(stops):
            seen.append(f"{name}{stop}")
            lockstep.rendezvous()
        return name

    results = lockstep.run([lambda: closure("a", 3), lambda: closure("b", 1), lambda: closure("c", 2)])
    assert results == ["a", "b", "c"]
    assert seen == ["a0", "b0", "c0", "a1", "c1", "a2"]


def test_the_switches_surround_every_turn() -> None:
    calls: list[str] = []
    lockstep = Lockstep(lambda i: calls.append(f"-{i}"), lambda i: calls.append(f"+{i}"))
    lockstep.run([lockstep.rendezvous, lockstep.rendezvous])
    assert calls == ["+0", "-0", "+1", "-1", "+0", "-0", "+1", "-1"]


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
