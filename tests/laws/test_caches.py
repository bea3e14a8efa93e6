"""Law: nothing of a step is kept when it ends, and every cache is bounded by the bytes that it holds."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from functools import _lru_cache_wrapper
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
    "_names": 4000,
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
