"""Law: a process that trains does not grow, and every cache is bounded by the bytes that it holds."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import platform
import subprocess
import sys
from collections.abc import Iterator
from functools import _lru_cache_wrapper
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import closure, tiny

import zo_core
from zo_core import NOISES, ZeroOrder
from zo_core.cache import ENTRY_BYTES, ByteCache, _caches, clear_caches, end_step, kept, workspace
from zo_core.noise import hashing, low_rank
from zo_core.noise.hashing import used_once, words
from zo_core.probing.scratch import ScratchPool

CPU = torch.device("cpu")
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
    steps = 400 if offload == "disk" else 1000  # each block of a step waits for the disk
    assert grown(runner(front=front, noise=noise, rule=rule, offload=offload, steps=steps)) < BOUND


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


# Steps


def kept_per_step() -> int:
    return sum(cache.nbytes for cache in _caches if cache.per_step)


@pytest.mark.usefixtures("cold_caches")
@pytest.mark.parametrize("offload", [None, "cpu"])
@pytest.mark.parametrize("noise", list(NOISES))
def test_nothing_of_a_step_is_kept_when_it_ends(noise: str, offload: str | None) -> None:
    model = tiny("llama", dtype=torch.bfloat16)
    zo = ZeroOrder(model, lr=1e-3, noise=noise, offload=offload)
    run = closure("llama", model)
    for _ in range(2):
        zo.measure(run)
        # The first may draw nothing, and the second needs no words.
        assert kept_per_step() > 0 or noise in ("sampled", "coordinates")
        zo.optimizer.step()
        zo.flush()
        assert kept_per_step() == 0
    zo.measure(run)
    zo.discard()
    assert kept_per_step() == 0
    record = zo.step(run)
    zo.repeat(record.probes, record.loss)
    zo.optimizer.step()
    zo.close()
    assert kept_per_step() == 0


@pytest.mark.usefixtures("cold_caches")
def test_words_wait_for_streamed_updates_and_no_longer() -> None:
    model = tiny("llama")
    zo = ZeroOrder(model, lr=1e-3, offload="cpu")
    sizes = []
    for _ in range(6):
        zo.step(closure("llama", model))
        sizes.append(kept_per_step())
    assert sizes[0] > 0
    assert len(set(sizes)) == 1
    zo.close()
    assert kept_per_step() == 0


@pytest.mark.usefixtures("cold_caches")
def test_a_step_that_is_skipped_or_fails_leaves_nothing() -> None:
    model = tiny("llama")
    zo = ZeroOrder(model, lr=1e-3)
    zo.step(lambda: closure("llama", model)() * float("nan"))
    assert kept_per_step() == 0

    def fails() -> None:
        closure("llama", model)()
        raise RuntimeError("in mid-step")

    with pytest.raises(RuntimeError, match="in mid-step"):
        zo.step(fails)
    assert kept_per_step() == 0


@pytest.mark.usefixtures("cold_caches")
@pytest.mark.parametrize("num_probes", [1, 2])
def test_v_is_made_once_in_a_window_and_goes_with_it(num_probes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    original = low_rank.LowRank._signs

    def counting(self: Any, seed: int, slot: str, shape: Any, purpose: int, device: torch.device) -> torch.Tensor:
        if purpose == hashing.BASIS:
            made.append(seed)
        return original(self, seed, slot, shape, purpose, device)

    monkeypatch.setattr(low_rank.LowRank, "_signs", counting)
    model = tiny("llama")
    zo = ZeroOrder(model, lr=1e-3, noise={"name": "low_rank", "refresh": 4}, num_probes=num_probes)
    counts, sizes = [], []
    for _ in range(12):
        zo.step(closure("llama", model))
        counts.append(len(made))
        sizes.append(low_rank._rights.nbytes)
    per_window = counts[0]
    assert per_window > 0
    assert counts[:4] == [per_window] * 4
    assert counts[-1] == 3 * per_window
    assert sizes[:4] == sizes[4:8] == sizes[8:]


def test_words_of_updates_that_come_late_are_not_kept() -> None:
    clear_caches()
    with used_once():
        late = words((1, 2), 0, 100, CPU)
    assert len(hashing._words) == 0
    assert torch.equal(words((1, 2), 0, 100, CPU), late)
    assert len(hashing._words) == 1


# Caches


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 600), st.booleans()), max_size=40),
    st.integers(0, 4 * ENTRY_BYTES),
)
def test_a_cache_counts_what_it_holds_and_stays_within_its_bound(puts: list[tuple[int, int, bool]], bound: int) -> None:
    cache: ByteCache[torch.Tensor] = ByteCache(bound)
    shared = torch.zeros(300)
    for name, size, views in puts:
        value = shared[: size // 2] if views else torch.zeros(size)
        assert cache.put(name, value) is value
        held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in cache._entries.values()}
        assert cache.nbytes == sum(held.values()) + ENTRY_BYTES * len(cache) <= bound
    cache.keep(lambda name: name < 3)
    assert all(name < 3 for name in cache._entries)
    cache.clear()
    assert (cache.nbytes, len(cache), len(cache._users)) == (0, 0, 0)


def test_a_view_counts_with_all_of_its_memory_once() -> None:
    cache: ByteCache[Any] = ByteCache(1 << 20)
    whole = torch.zeros(1000)
    cache.put("a", whole[:1])
    cache.put("b", (whole[1:2], 7))
    assert cache.nbytes == 4000 + 2 * ENTRY_BYTES
    cache.keep(lambda name: name == "b")
    assert cache.nbytes == 4000 + ENTRY_BYTES


def test_what_was_used_last_stays() -> None:
    cache: ByteCache[torch.Tensor] = ByteCache(2 * (ENTRY_BYTES + 400))
    for name in "ab":
        cache.put(name, torch.zeros(100))
    cache.get("a")
    cache.put("c", torch.zeros(100))
    assert (cache.get("b"), len(cache)) == (None, 2)
    cache.put("too large", torch.zeros(10_000))
    assert len(cache) == 2


def test_a_step_ends_for_what_was_kept_for_it() -> None:
    calls: list[int] = []

    def make(size: int) -> torch.Tensor:
        calls.append(size)
        return torch.zeros(size)

    lasting, passing = kept(1 << 20)(make), kept(1 << 20, per_step=True)(make)
    for _ in range(2):
        lasting(1), passing(2)
    assert calls == [1, 2]
    end_step()
    lasting(1), passing(2)
    assert calls == [1, 2, 2]
    clear_caches()
    lasting(1)
    assert calls == [1, 2, 2, 1]


def test_one_verb_empties_all_caches() -> None:
    model = tiny("llama", dtype=torch.bfloat16)
    for noise in NOISES:
        ZeroOrder(model, lr=1e-3, noise=noise).step(closure("llama", model))
    assert any(cache.nbytes for cache in _caches)
    buffer = workspace("sum", 8, CPU)
    clear_caches()
    assert not any(cache.nbytes or len(cache) for cache in _caches)
    assert workspace("sum", 8, CPU).data_ptr() != buffer.data_ptr()


def test_all_caches_together_have_a_bound() -> None:
    assert sum(cache.max_bytes for cache in _caches if cache.max_bytes > 1 << 20) < 300 << 20


def modules() -> Iterator[Any]:
    for info in pkgutil.walk_packages(zo_core.__path__, "zo_core."):
        if "triton" not in info.name and not info.name.endswith("__main__"):
            yield importlib.import_module(info.name)


#: What functions with a cache of the standard library return, and the most bytes that a result takes with its name.
PLAIN = {
    "_digest": 300,
    "stream_key": 400,
    "block_of": 600,
    "_layout": 1000,
    "step_struct": 1000,
    "_name": 300,
    "_compiled": 1 << 17,
    "_malloc_trim": 300,
    "_class_of": 4000,
    "triton_works": 300,
}


def test_caches_of_the_standard_library_are_bounded_and_hold_no_tensors() -> None:
    found = {}
    for module in modules():
        found |= {
            n: f
            for n, f in vars(module).items()
            if isinstance(f, _lru_cache_wrapper) and module.__name__ == f.__module__
        }
    assert found.keys() == PLAIN.keys()
    for name, function in found.items():
        assert function.cache_parameters()["maxsize"] * PLAIN[name] < 64 << 20


@pytest.mark.parametrize("name", ["llama", "t5", "functional_tied_head"])
def test_scratch_is_as_large_after_many_steps_as_after_one(name: str) -> None:
    model = tiny(name)
    zo = ZeroOrder(model, lr=1e-3, num_probes=2)
    pool, sizes = zo.oracle.realisation.pool, []
    for _ in range(4):
        zo.step(closure(name, model))
        sizes.append(pool.nbytes)
    moving = sum(slot.tensor.numel() * slot.tensor.element_size() for slot in zo.slots)
    assert 0 < sizes[0] <= moving
    assert len(set(sizes)) == 1
    pool.clear()
    assert pool.nbytes == 0


def test_scratch_that_is_in_use_is_not_handed_out_again() -> None:
    pool = ScratchPool()
    like = torch.empty(1000)
    first, second = pool.take(like), pool.take(like)
    assert first.data_ptr() != second.data_ptr()
    assert pool.nbytes == 8000
    del first, second
    for _ in range(5):
        pool.take(like)
    assert pool.nbytes == 8000
