"""Laws: Triton's kernels give the bits of the eager passes, one at a time or many in one launch.

On a GPU the laws run under the mark ``gpu``. Without one, `test_interpreter.py` runs this file and
`test_triton_together.py` in Triton's interpreter, in a process of its own, because TRITON_INTERPRET must be set before
Triton is imported. The interpreter computes with numpy: what it cannot show (the compiler, fused multiply-add,
subnormals on the device, launches) is left to the GPU.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from zo_core.noise.changes import Change, Pass, together
from zo_core.noise.hashing import rounding_bits, words
from zo_core.noise.mailbox import Mailbox
from zo_core.rules import Momentum

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from triton_passes import (  # noqa: E402
    DEVICE,
    DTYPES,
    INTERPRETED,
    LARGE,
    MARKS,
    NOISES,
    SIZES,
    cases,
    change,
    check,
    direction,
    masked,
    moved,
    real,
    same,
    scales,
    several,
    weights,
)

from zo_core.noise import triton_backend, triton_kernels  # noqa: E402  (they import triton)

pytestmark = MARKS

#: Parts of 40 x 66 values, by name: with any strides, of one dimension or more.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed columns": lambda t: t.view(40, 66)[:, 1:-1].t(),
    "from the second on": lambda t: t[1:],
    "every third": lambda t: t[::3],
    "one column": lambda t: t.view(40, 66)[:, 5],
    "a column as a matrix": lambda t: t.view(40, 66)[:, 5:6],
}
HIGH = (0, (1 << 18) - 64, 1 << 18, 1 << 31, (1 << 32) - 64, 1 << 32, 3 << 33)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise", NOISES)
@several
@given(case=cases)
def test_any_pass_equals_the_eager_one(noise: str, dtype: str, case: dict[str, Any]) -> None:
    make = weights if case["scaling"] is None else scales
    theta = make(DTYPES[dtype], case["size"])
    along = replace(direction(noise, case["count"], case["rounding"]), scaling=case["scaling"])
    if case["quantile"] is not None:
        along = masked(along, case["quantile"])
    check(theta, along, change(case["kind"], theta.numel(), case["decay"]), case["out"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise", NOISES)
def test_probes_and_updates_of_every_size(noise: str, dtype: str) -> None:
    sizes = SIZES if INTERPRETED else [*SIZES, *LARGE]
    for size, rounding, decay in itertools.product(sizes, (None, 5), (1.0, 0.999)):
        check(weights(DTYPES[dtype], size), direction(noise, 1, rounding), change("add", size, decay), out=True)


@pytest.mark.parametrize("kind", ["add", "momentum"])
@pytest.mark.parametrize("count", [32, 33, 50])
def test_many_terms(count: int, kind: str) -> None:
    size = 1000 if INTERPRETED else 300_000
    for noise, dtype in (("rademacher", torch.bfloat16), ("gaussian", torch.float32)):
        check(weights(dtype, size), direction(noise, count), change(kind, size))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise", NOISES)
def test_ties(noise: str, dtype: str) -> None:
    """Weights and signs that end half-way between two values."""
    step = torch.finfo(DTYPES[dtype]).eps
    theta = (1 + torch.arange(1000, dtype=torch.float64).remainder(100) * step).to(DTYPES[dtype])
    check(theta, replace(direction(noise, rounding=None), terms=((3, step / 2),)), Change())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS)
def test_any_strides(view: str, dtype: str) -> None:
    whole = weights(DTYPES[dtype], 40 * 66)
    there = whole.to(DEVICE, copy=True)
    for noise, kind in (("rademacher", "add"), ("gaussian", "momentum")):
        by = change(kind, VIEWS[view](whole).numel(), 0.999)
        replace(direction(noise, 3), backend="eager").apply(VIEWS[view](whole), moved(by, torch.device("cpu")))
        direction(noise, 3).apply(VIEWS[view](there), moved(by, DEVICE))
        assert same(whole, there)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_nan_and_infinity_survive(dtype: str) -> None:
    for kind in ("add", "momentum"):
        theta = torch.tensor([float("nan"), float("inf"), -float("inf")] * 100, dtype=DTYPES[dtype], device=DEVICE)
        direction("rademacher").apply(theta, moved(change(kind, 300), DEVICE))
        assert theta[0::3].isnan().all()
        assert theta[1::3].eq(float("inf")).all()
        assert theta[2::3].eq(-float("inf")).all()


# Words


@triton.jit
def words_kernel(out, first, key0, key1, ROUNDING: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    if ROUNDING:
        word = triton_kernels._rounding_bits(tl.load(first), index.to(tl.uint32), key0, key1, 16)
    else:
        word = triton_kernels._words(tl.load(first), index.to(tl.uint32), key0, key1)
    tl.store(out + index, word.to(tl.int32))


@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("start", HIGH)
def test_words_on_both_sides_of_32_bits(start: int, rounding: bool) -> None:
    key, cpu = (-123456789, 987654321), torch.device("cpu")
    out = torch.empty(64, dtype=torch.int32, device=DEVICE)
    # In memory, because the interpreter stores scalar arguments from 2**31 to 2**32 as 32 bits.
    first = torch.tensor([start], dtype=torch.int64, device=DEVICE)
    words_kernel[(1,)](out, first, *key, ROUNDING=rounding, BLOCK=64)
    wanted = rounding_bits(key, 16, start, 64, cpu) if rounding else words(key, start, 64, cpu)
    assert torch.equal(out.cpu(), wanted)


# What the interpreter cannot show


@real
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise", NOISES)
def test_eager_passes_on_the_device_equal_those_on_the_cpu(noise: str, dtype: str) -> None:
    for size, kind, rounding in itertools.product([*SIZES, *LARGE], ("add", "momentum", "sign"), (None, 5)):
        theta, by = weights(DTYPES[dtype], size), change(kind, size, 0.999)
        along = replace(direction(noise, 2, rounding), backend="eager")
        there = theta.cuda()
        along.apply(there, moved(by, DEVICE))
        along.apply(theta, by)
        assert same(theta, there)


@real
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("noise", NOISES)
def test_launches_do_not_wait_for_the_device(noise: str, count: int) -> None:
    slots = [weights(torch.bfloat16, 5000).cuda() for _ in range(3)]
    states: list[dict[str, Any]] = [{} for _ in slots]

    def run() -> None:
        with together():
            for theta, state in zip(slots, states, strict=True):
                Momentum().update(theta, state, direction(noise, count), 1e-3, 0.0)
        direction(noise, count).add_to(slots[0])

    run()
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_is_left_to_eager() -> None:
    theta = torch.zeros(8, device=DEVICE)
    move = direction("rademacher")
    assert triton_backend.supports(Pass(theta, move, Change(), theta))
    assert not triton_backend.supports(Pass(theta.double(), move, Change(), theta.double()))
    assert not triton_backend.supports(Pass(theta, replace(move, offset=0), Change(), theta))


def test_a_kernel_that_fails_is_replaced_by_the_eager_pass(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("ptxas fatal: no\nmore lines")

    monkeypatch.setattr(triton_backend, "_launch", fails)
    theta = weights(torch.bfloat16, 100)
    there = theta.to(DEVICE, copy=True)
    replace(direction("gaussian"), backend="eager").add_to(theta)
    direction("gaussian").add_to(there)
    assert same(theta, there)
    direction("gaussian").add_to(there)
    (record,) = caplog.records
    assert "ptxas fatal: no" in record.getMessage()
    assert "more lines" not in record.getMessage()
    triton_backend._failed.clear()


@pytest.mark.parametrize("count", [1, 7, 224, 1024, 1025, 5000])
def test_a_kernel_fetches_a_table_out_of_host_memory(count: int) -> None:
    numbers = [(-1) ** at * (at << 40) + at for at in range(count)]
    box = Mailbox(not INTERPRETED, lambda: None, 8192)
    values = torch.zeros(count + 1, dtype=torch.int64, device=DEVICE)
    box.put(numbers, partial(triton_backend._fetch, values[:count]))
    assert values.tolist() == [*numbers, 0]


@real
def test_tables_do_not_wait_for_copies() -> None:
    """A copy of a second is under way in the same direction."""
    large = torch.empty(1 << 33, dtype=torch.uint8, device=DEVICE)
    host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    triton_backend._on_device([1, 2, 3], DEVICE)
    torch.cuda.synchronize()
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        for part in large.split(len(host)):
            part.copy_(host, non_blocking=True)
        end = aside.record_event()
    values = triton_backend._on_device([4, 5, 6], DEVICE)
    here = torch.cuda.current_stream().record_event()
    here.synchronize()
    assert not end.query()
    assert values.tolist() == [4, 5, 6]
    torch.cuda.synchronize()
