"""Passes of the eager backend and of Triton's kernels, side by side, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from zo_core.noise import Direction, Gaussian, Rademacher
from zo_core.noise.changes import Change
from zo_core.noise.direction import Scaling, float32
from zo_core.noise.sparse import SparseDirection

triton = pytest.importorskip("triton")


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


#: What every file of these laws begins with.
MARKS = [
    pytest.mark.usefixtures("in_kernels"),
    pytest.mark.gpu,
    pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA device: none is available"),
]
real = pytest.mark.skipif(INTERPRETED, reason="what the interpreter cannot show")

NOISES = {"rademacher": Rademacher(), "gaussian": Gaussian()}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCALINGS = [None, Scaling(relative=True, floor=1e-3), Scaling(relative=False, floor=1e-3)]
#: Sizes on both sides of a word's and of a program's elements.
SIZES = [1, 15, 31, 32, 33, 1000, 1024, 1040, 2500]
LARGE = [(1 << 18) + 7, 5_000_000]


def weights(dtype: torch.dtype, size: int) -> Tensor:
    """Weights of every magnitude, subnormal ones and both zeros included."""
    generator = torch.Generator().manual_seed(size)
    lowest = -8 if dtype == torch.float16 else -42
    exponents = torch.rand(size, generator=generator, dtype=torch.float64) * (1 - lowest) + lowest
    theta = (torch.randn(size, generator=generator, dtype=torch.float64) * 10**exponents).to(dtype)
    theta[::7] = 0.0
    theta[3::7] = -0.0
    return theta


def scales(dtype: torch.dtype, size: int) -> Tensor:
    """Positive scales on both sides of the floor, and zeros."""
    theta = (torch.randn(size, generator=torch.Generator().manual_seed(size)).abs() * 10 ** -torch.rand(size) * 4).to(
        dtype
    )
    theta[::7] = 0.0
    return theta


def same(left: Tensor, right: Tensor) -> bool:
    """Equality of the bits, which tells 0.0 from -0.0."""
    whole = {2: torch.int16, 4: torch.int32}[left.element_size()]
    return torch.equal(left.cpu().contiguous().view(whole), right.cpu().contiguous().view(whole))


def terms(count: int) -> tuple[tuple[int, float], ...]:
    return tuple((9 + 2**40 * k, (-1) ** k * 3e-3 / (1 + k % 7)) for k in range(count))


def direction(noise: str, count: int = 1, rounding: int | None = 5, slot: str = "layer.weight") -> Direction:
    return Direction(NOISES[noise], slot, terms(count), rounding, "triton")


def masked(plain: Direction, quantile: float) -> Direction:
    fields = {name: getattr(plain, name) for name in ("noise", "slot", "terms", "rounding_seed", "backend", "scaling")}
    return SparseDirection(**fields, quantile=quantile)


def change(kind: Any, size: int, decay: float = 1.0) -> Change:
    momentum = torch.randn(size, generator=torch.Generator().manual_seed(size)) if kind == "momentum" else None
    return Change(kind, float32(decay), float32(-1e-2), float32(0.9), momentum)


def moved(one: Change, device: torch.device) -> Change:
    return replace(one, momentum=None if one.momentum is None else one.momentum.to(device, copy=True))


def check(theta: Tensor, along: Direction, by: Change, out: bool = False) -> None:
    """The kernel and the eager pass on the CPU give the same bits, in weights and momentum."""
    expected, eager = theta.clone(), moved(by, torch.device("cpu"))
    replace(along, backend="eager").apply(expected, eager)
    there, here = moved(by, DEVICE), theta.to(DEVICE, copy=True)
    result = torch.empty_like(here) if out else here
    along.apply(here, there, result)
    assert same(expected, result)
    assert not out or same(theta, here)
    assert eager.momentum is None or same(eager.momentum, there.momentum)


cases = st.fixed_dictionaries(
    {
        "size": st.sampled_from(SIZES if INTERPRETED else [*SIZES, LARGE[0]]),
        "count": st.sampled_from([1, 2, 3, 6]),
        "rounding": st.sampled_from([None, 5]),
        "decay": st.sampled_from([1.0, 0.999]),
        "kind": st.sampled_from(["add", "sign", "momentum"]),
        "scaling": st.sampled_from(SCALINGS),
        "quantile": st.sampled_from([None, 0.3]),
        "out": st.booleans(),
    }
)
several = settings(max_examples=20 if INTERPRETED else 14, suppress_health_check=list(HealthCheck), deadline=None)
