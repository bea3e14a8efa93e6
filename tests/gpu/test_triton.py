"""The Triton kernel gives the bits of the eager passes.

Without a GPU the kernel runs in Triton's interpreter, in a process of its own, because
TRITON_INTERPRET must be set before Triton is imported. That process runs this file and prints one
line of JSON. The interpreter computes with numpy: what it cannot show (the compiler, fused
multiply-add, subnormals on the device, launches) is left to the tests marked ``gpu``.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from zo_core.noise import Direction, Gaussian, Rademacher
from zo_core.noise.direction import float32
from zo_core.noise.hashing import rounding_bits, words

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from zo_core.noise import triton_backend  # noqa: E402  (it imports triton)

NOISES = {"rademacher": Rademacher(), "gaussian": Gaussian()}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TERMS = {1: ((9, 3e-6),), 3: ((9, 3e-6), (2**62 + 5, -5e-4), (11, 2e-2))}
OPTIONS = list(itertools.product(TERMS, (None, 5), (1.0, 0.999)))
SIZES = (0, 1, 31, 32, 33, 1000, 5000)
GPU_SIZES = (1, 33, 1000, 4096, (1 << 18) + 7, 5_000_000)
#: Parts of 40 x 66 values, by name: with any strides, of one dimension or more.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed columns": lambda t: t.view(40, 66)[:, 1:-1].t(),
    "from the second on": lambda t: t[1:],
    "every third": lambda t: t[::3],
    "one column": lambda t: t.view(40, 66)[:, 5],
    "a column as a matrix": lambda t: t.view(40, 66)[:, 5:6],
}
HIGH = (0, (1 << 18) - 64, 1 << 18, 1 << 31, (1 << 32) - 64, 1 << 32, 3 << 33)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: none is available")


def weights(dtype: torch.dtype, size: int) -> Tensor:
    """Weights of every magnitude, subnormal ones and both zeros included."""
    generator = torch.Generator().manual_seed(size)
    lowest = -8 if dtype == torch.float16 else -42
    exponents = torch.rand(size, generator=generator, dtype=torch.float64) * (1 - lowest) + lowest
    theta = (torch.randn(size, generator=generator, dtype=torch.float64) * 10**exponents).to(dtype)
    theta[::7] = 0.0
    theta[3::7] = -0.0
    return theta


def direction(noise: str, terms: int, rounding: int | None, backend: str = "eager") -> Direction:
    return Direction(NOISES[noise], "layer.weight", TERMS[terms], rounding, backend)


def ties(dtype: torch.dtype, noise: str) -> tuple[Tensor, Direction]:
    """Weights and signs that end half-way between two values of ``dtype``."""
    step = torch.finfo(dtype).eps
    theta = 1 + torch.arange(1000, dtype=torch.float64).remainder(100) * step
    return theta.to(dtype), Direction(NOISES[noise], "layer.weight", ((3, step / 2),))


def same(left: Tensor, right: Tensor) -> bool:
    """Equality of the bits, which tells 0.0 from -0.0."""
    whole = {2: torch.int16, 4: torch.int32}[left.element_size()]
    return torch.equal(left.contiguous().view(whole), right.cpu().contiguous().view(whole))


@triton.jit
def arange_kernel(out, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(out + index, index)


@triton.jit
def words_kernel(out, first, key0, key1, ROUNDING: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    if ROUNDING:
        word = triton_backend._rounding_bits(tl.load(first), index.to(tl.uint32), key0, key1, 16)
    else:
        word = triton_backend._words(tl.load(first), index.to(tl.uint32), key0, key1)
    tl.store(out + index, word.to(tl.int32))


def word_mismatches(device: torch.device) -> list[str]:
    """Starts at which the kernel's words differ, on both sides of 2**32."""
    key, wrong = (-123456789, 987654321), []
    for start, rounding in itertools.product(HIGH, (False, True)):
        out = torch.empty(64, dtype=torch.int32, device=device)
        # In memory, because the interpreter stores scalar arguments from 2**31 to 2**32 as 32 bits.
        first = torch.tensor([start], dtype=torch.int64, device=device)
        words_kernel[(1,)](out, first, *key, ROUNDING=rounding, BLOCK=64)
        cpu = torch.device("cpu")
        wanted = rounding_bits(key, 16, start, 64, cpu) if rounding else words(key, start, 64, cpu)
        if not torch.equal(out.cpu(), wanted):
            wrong.append(f"start={start} rounding={rounding}")
    return wrong


def interpreted_mismatches(noise: str, dtype: str) -> list[str]:
    """Settings under which the interpreted kernel and the eager pass differ in a bit."""
    wrong = []
    for (terms, rounding, decay), size in itertools.product(OPTIONS, SIZES):
        theta, move = weights(DTYPES[dtype], size), direction(noise, terms, rounding)
        expected = move.add_to(theta, decay, torch.empty_like(theta))
        before, out = theta.clone(), torch.empty_like(theta)
        triton_backend.add_direction(move, theta, float32(decay), out)
        right = same(expected, out) and same(before, theta)
        if size == 1000:
            triton_backend.add_direction(move, theta, float32(decay), theta)
            right = right and same(expected, theta)
        if not right:
            wrong.append(f"terms={terms} rounding={rounding} decay={decay} size={size}")
    theta, move = ties(DTYPES[dtype], noise)
    out = torch.empty_like(theta)
    triton_backend.add_direction(move, theta, 1.0, out)
    if not same(move.add_to(theta, out=torch.empty_like(theta)), out):
        wrong.append("ties")
    for rounding, (name, take) in itertools.product((None, 5), VIEWS.items()):
        whole, move = weights(DTYPES[dtype], 40 * 66), direction(noise, 3, rounding)
        before, theta = whole.clone(), take(whole)
        expected = move.add_to(theta, 0.999, torch.empty_like(theta))
        triton_backend.add_direction(move, theta, float32(0.999), theta)
        take(before).copy_(expected)
        if not same(before, whole):
            wrong.append(f"{name}, rounding={rounding}")
    return wrong


def interpret() -> dict[str, Any]:
    """What the process with the interpreter reports."""
    torch.set_num_threads(1)
    try:
        out = torch.zeros(8, dtype=torch.int32)
        arange_kernel[(1,)](out, BLOCK=8)
        assert out.tolist() == list(range(8))
    except Exception as error:
        return {"unusable": f"triton {triton.__version__}'s interpreter does not work here: {error!r}"}
    pairs = itertools.product(NOISES, DTYPES)
    found = {f"{noise} {dtype}": interpreted_mismatches(noise, dtype) for noise, dtype in pairs}
    return {**found, "words": word_mismatches(torch.device("cpu"))}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    run = subprocess.run(
        [sys.executable, "-W", "error", __file__], env=environment, capture_output=True, text=True, timeout=280
    )
    assert run.returncode == 0, run.stderr
    report: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    if "unusable" in report:
        pytest.skip(report["unusable"])
    return report


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise", NOISES)
def test_interpreted_kernel_equals_eager(interpreted: dict[str, Any], noise: str, dtype: str) -> None:
    assert interpreted[f"{noise} {dtype}"] == []


@pytest.mark.slow
def test_interpreted_words_equal_eager_beyond_32_bits(interpreted: dict[str, Any]) -> None:
    assert interpreted["words"] == []


def test_what_is_left_to_eager() -> None:
    move = direction("rademacher", 1, None)
    assert triton_backend.supports(move, torch.float32)
    assert not triton_backend.supports(move, torch.float64)
    many = Direction(move.noise, move.slot, move.terms * (triton_backend.MAX_TERMS + 1))
    assert not triton_backend.supports(many, torch.float32)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise", NOISES)
def test_cuda_equals_cpu(noise: str, dtype: str, backend: str) -> None:
    wrong = []
    for (terms, rounding, decay), size in itertools.product(OPTIONS, GPU_SIZES):
        theta = weights(DTYPES[dtype], size)
        there = theta.cuda()
        expected = direction(noise, terms, rounding).add_to(theta, decay, torch.empty_like(theta))
        out = direction(noise, terms, rounding, backend).add_to(there, decay, torch.empty_like(there))
        unharmed = same(theta, there)
        direction(noise, terms, rounding, backend).add_to(there, decay)
        if not (unharmed and same(expected, out) and same(expected, there)):
            wrong.append(f"terms={terms} rounding={rounding} decay={decay} size={size}")
    theta, move = ties(DTYPES[dtype], noise)
    if not same(move.add_to(theta.clone()), replace(move, backend=backend).add_to(theta.cuda())):
        wrong.append("ties")
    assert wrong == []


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise", NOISES)
def test_cuda_equals_cpu_for_any_strides(noise: str, dtype: str, backend: str) -> None:
    whole = weights(DTYPES[dtype], 40 * 66)
    there = whole.cuda()
    for take in VIEWS.values():
        expected, moved = take(whole.clone()), take(there.clone())
        direction(noise, 3, 5).add_to(expected, 0.999)
        direction(noise, 3, 5, backend).add_to(moved, 0.999)
        assert same(expected, moved)


@pytest.mark.gpu
@needs_gpu
def test_cuda_words_beyond_32_bits() -> None:
    assert word_mismatches(torch.device("cuda")) == []


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("noise", NOISES)
def test_launches_do_not_wait_for_the_device(noise: str, terms: int) -> None:
    theta, move = weights(torch.bfloat16, 5000).cuda(), direction(noise, terms, 5, "triton")
    move.add_to(theta)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        move.add_to(theta)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_nan_and_infinity_survive_stochastic_rounding(dtype: str) -> None:
    theta = torch.tensor([float("nan"), float("inf"), -float("inf")] * 100, dtype=DTYPES[dtype], device="cuda")
    direction("rademacher", 1, 5, "triton").add_to(theta)
    assert theta[0::3].isnan().all()
    assert theta[1::3].eq(float("inf")).all()
    assert theta[2::3].eq(-float("inf")).all()


if __name__ == "__main__":
    print(json.dumps(interpret()))
