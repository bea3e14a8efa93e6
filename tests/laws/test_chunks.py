"""Laws: the size of chunks changes no bit, and on a GPU bounds both the memory and the launches of an eager pass."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zo_core.noise import Gaussian, Noise, Rademacher, direction
from zo_core.noise.changes import Change
from zo_core.noise.direction import CHUNK_BYTES, DEVICE_CHUNK, Direction, chunk_sizes, float32
from zo_core.noise.hashing import ROUNDING_SPAN, rounding_bits, used_once

CPU = torch.device("cpu")
META = torch.device("meta")  # any other device than the CPU
KINDS = ("add", "sign", "momentum")


def change(kind: Any, size: int) -> Change:
    momentum = torch.linspace(-1, 1, size) if kind == "momentum" else None
    return Change(kind, float32(0.99), float32(-1e-3), float32(0.9), momentum)


def along(noise: Noise, count: int) -> Direction:
    terms = tuple((seed, 1e-3) for seed in range(count))
    return noise.direction("weight", torch.Size(()), terms, direction.Passes(rounding_seed=3))


def in_device_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on passes on the CPU take the chunks of other devices."""
    sizes = {n: chunk_sizes(n, META) for n in (2, 32)}
    monkeypatch.setattr(direction, "chunk_sizes", lambda per_word, device: sizes[per_word])


def test_chunks_of_other_devices_are_large_for_every_noise() -> None:
    for per_word in (1, 2, 3, 32):
        batch, chunk = chunk_sizes(per_word, META)
        assert batch == chunk
        assert DEVICE_CHUNK / 2 < chunk <= DEVICE_CHUNK
        words = batch // per_word
        assert words & (words - 1) == 0  # so that none contains a multiple of 2**32


@pytest.mark.usefixtures("cold_caches")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("noise", [Rademacher(), Gaussian()], ids=["rademacher", "gaussian"])
def test_larger_chunks_give_the_same_bits(noise: Noise, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size = DEVICE_CHUNK + 77
    weights = torch.linspace(-2, 2, size).to(torch.bfloat16)
    expected = along(noise, 1).apply(weights.clone(), change(kind, size))
    in_device_chunks(monkeypatch)
    assert torch.equal(expected, along(noise, 1).apply(weights.clone(), change(kind, size)))


@pytest.mark.parametrize("start", [0, 5, ROUNDING_SPAN - 1, 3 * ROUNDING_SPAN + 7])
@pytest.mark.parametrize("count", [1, 2, ROUNDING_SPAN + 5, 2 * ROUNDING_SPAN])
def test_rounding_bits_of_several_spans_are_those_of_each(start: int, count: int) -> None:
    key = (-123456789, 987654321)
    parts, at = [], start
    while at < start + count:
        stop = min(start + count, (at // ROUNDING_SPAN + 1) * ROUNDING_SPAN)
        parts.append(rounding_bits(key, 13, at, stop - at, CPU))
        at = stop
    assert torch.equal(rounding_bits(key, 13, start, count, CPU), torch.cat(parts))


class Watched(TorchDispatchMode):
    """Counts the operations, which are launches on a GPU, and the bytes of the tensors that they make."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in (*args, *(kwargs or {}).values()):
            if isinstance(value, Tensor) and value is not result:
                self.known.add(value.untyped_storage()._cdata)
        if isinstance(result, Tensor):
            storage = result.untyped_storage()
            self.operations += not func.is_view
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return result

    def freed(self, name: int, size: int) -> None:
        self.known.discard(name)
        self.now -= size


@pytest.mark.usefixtures("cold_caches")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("noise", [Rademacher(), Gaussian()], ids=["rademacher", "gaussian"])
def test_an_eager_pass_has_bounded_memory_and_launches(
    noise: Noise, dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_device_chunks(monkeypatch)
    size = 2 * DEVICE_CHUNK
    for count in (1, 2):
        weights, by = torch.ones(size, dtype=dtype), change(kind, size)
        with Watched() as seen, used_once():
            along(noise, count).apply(weights, by)
        assert seen.peak <= CHUNK_BYTES * DEVICE_CHUNK
        assert seen.operations <= 2 * (35 + 30 * count)  # of which words take 23 for each term
