"""Law: work that an interrupt must not cut runs on a thread, which ends with its owner and never leaves it waiting."""

from __future__ import annotations

import gc
import os
import threading
import time

import pytest

from zo_core.whole import Whole


def threads() -> int:
    return sum(thread.name == "zo-exchange" for thread in threading.enumerate())


def test_errors_come_back_and_the_thread_ends_with_its_owner() -> None:
    before = threads()
    whole = Whole()
    assert [whole.run(lambda: 3), threads()] == [3, before + 1]
    with pytest.raises(ZeroDivisionError):
        whole.run(lambda: 1 // 0)
    del whole
    gc.collect()
    assert threads() == before


def test_a_thread_that_cannot_start_is_an_error_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Whole()

    def refused(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="can't start"):
                whole.run(lambda: 3)
    assert whole.run(lambda: 3) == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_a_thread_of_its_own() -> None:
    whole = Whole()
    whole.run(lambda: 3)
    child = os.fork()
    if child == 0:
        os._exit(0 if whole.run(lambda: 4) == 4 else 1)
    end, found = time.monotonic() + 30, (0, 0)
    while found[0] == 0 and time.monotonic() < end:
        found = os.waitpid(child, os.WNOHANG)
        time.sleep(0.01)
    if found[0] == 0:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert found == (child, 0)
