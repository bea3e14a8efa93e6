"""Law: a process that trains does not grow, whatever the way to train."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from zo_core import NOISES

ROOT = Path(__file__).parents[1]

#: By how much the last steps may exceed the first ones, in MB. A Python process moves by some hundred kilobytes, and
#: the brake keeps a hundred bytes a step; with the words of past steps kept, the first of the runs below grew by 7.
BOUND = 1.0

#: A block of the large model is 34 MB, and where glibc puts what a step frees differs from step to step.
LARGE_BOUND = 40.0


class Runner:
    """Processes in which long runs begin, one for each front end, with what it needs imported."""

    def __init__(self) -> None:
        self.processes: dict[str, subprocess.Popen[str]] = {}

    def __call__(self, **run: Any) -> list[float]:
        """The memory that a process has in the course of a run, in MB."""
        process = self.processes.get(run["front"])
        if process is None:
            environment = os.environ | {"PYTHONPATH": str(ROOT.parent), "PYTHONWARNINGS": "ignore"}
            command = [sys.executable, str(ROOT / "helpers" / "long_run.py"), run["front"]]
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
            self.processes[run["front"]] = process
        assert process.stdin is not None
        assert process.stdout is not None
        print(json.dumps(run), file=process.stdin, flush=True)
        lines = iter(process.stdout.readline, "")
        seen: list[float] | None = next((json.loads(line) for line in lines if line[0] in "[n"), None)
        assert seen is not None, "the run failed"
        return seen


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    found = Runner()
    yield found
    for process in found.processes.values():
        process.communicate()


def grown(seen: list[float]) -> float:
    """How much larger the process is at the end of a run than after an eighth of it, in MB."""
    assert len(seen) >= 20
    return max(seen[-2:]) - max(seen[1:3])


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("front", "noise", "rule", "offload"),
    [
        ("bare", "rademacher", "sgd", None),
        pytest.param("bare", "gaussian", "sign", "cpu", marks=pytest.mark.slow),
        ("bare", "low_rank", "momentum", None),
        pytest.param("bare", "sampled", "torch", None, marks=pytest.mark.slow),
        ("hf", "rademacher", "momentum", None),
        pytest.param("lightning", "low_rank", "sgd", None, marks=pytest.mark.slow),
    ],
)
def test_a_long_run_takes_no_more_than_a_short_one(
    runner: Runner, front: str, noise: str, rule: str, offload: str | None
) -> None:
    assert grown(runner(front=front, noise=noise, rule=rule, offload=offload, steps=400)) < BOUND


#: Every front end and place, each with several noises and rules, such that every two of these meet somewhere.
WAYS = [
    ("bare", None),
    ("bare", "cpu"),
    ("bare", "disk"),
    ("hf", None),
    ("hf", "cpu"),
    ("lightning", None),
    ("lightning", "cpu"),
]
RULES = ["sgd", "momentum", "sign", "torch"]


def runs() -> Iterator[tuple[str, str | None, str, str]]:
    """Front end, place, noise and rule of the long runs."""
    noises = list(NOISES)
    for index, (front, offload) in enumerate(WAYS):
        rules = [
            rule
            for rule in RULES
            if not (rule == "torch" and offload) and not (rule == "sign" and front == "lightning")
        ]
        for turn in range(3):
            yield front, offload, noises[(index + 2 * turn) % len(noises)], rules[(index + turn) % len(rules)]


@linux
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("front", "offload", "noise", "rule"), list(runs()))
def test_no_way_to_train_grows(runner: Runner, front: str, offload: str | None, noise: str, rule: str) -> None:
    steps = 400 if offload == "disk" else 700  # each block of a step waits for the disk
    assert grown(runner(front=front, noise=noise, rule=rule, offload=offload, steps=steps)) < BOUND


BACKPROP = {"backprop": ["blocks.5", "head"], "backprop_lr": 1e-4}


@linux
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("front", "noise", "offload", "processes", "more"),
    [
        ("bare", "one_block", None, 1, {"reuse": True}),
        ("bare", "one_block", "cpu", 1, {"reuse": True, "num_probes": 2}),
        ("hf", "sampled", None, 1, {"reuse": True, "num_probes": 2}),
        ("bare", "rademacher", None, 2, BACKPROP),
        ("bare", "rademacher", "cpu", 2, {**BACKPROP, "ranks": "data"}),
    ],
    ids=["reuse", "reuse streamed", "reuse in a trainer", "backprop in two", "backprop streamed in two"],
)
def test_reuse_and_backprop_in_two_processes_do_not_grow(
    runner: Runner, front: str, noise: str, offload: str | None, processes: int, more: dict[str, Any]
) -> None:
    steps = 400 if processes == 1 else 1000  # two processes fill buffers until step 160
    run = {"front": front, "noise": noise, "rule": "sgd", "offload": offload, "steps": steps, "more": more}
    assert grown(runner(**run, processes=processes)) < BOUND


@linux
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("noise", "rule", "offload", "steps"),
    [
        ("rademacher", "sgd", None, 60),
        ("gaussian", "momentum", "cpu", 30),
        ("low_rank", "sgd", None, 60),
    ],
)
def test_a_large_model_does_not_grow_either(
    runner: Runner, noise: str, rule: str, offload: str | None, steps: int
) -> None:
    """A direction has 12.6 MB of words or 200, so a cache that kept those of past steps would be full at once."""
    run = {"front": "bare", "noise": noise, "rule": rule, "offload": offload, "steps": steps, "size": "large"}
    assert grown(runner(**run)) < LARGE_BOUND


#: A thread frees the last memory of its heap, several times; prints by how many MB the process is larger each time.
FREED_LAST = """
import ctypes, threading
from zo_core.cache import trim_heaps

c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def anonymous():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

def work():
    for _ in range(3):
        pieces = [c.malloc(8 << 20) for _ in range(4)]
        for piece in pieces:
            ctypes.memset(piece, 1, 8 << 20)
        for piece in pieces:
            c.free(piece)
        trim_heaps()
        print(anonymous() - before)

c.free(c.malloc(31 << 20))  # from now on glibc takes pieces of up to 31 MiB from a heap
before = anonymous()
for _ in range(2):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such heaps")
def test_what_a_thread_frees_last_goes_back_too() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    environment |= {"PYTHONPATH": str(ROOT.parent)}
    command = [sys.executable, "-c", FREED_LAST]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert max(map(float, result.stdout.split())) < 4.0  # of 32
