"""Law: weights move by ``round(decay * theta + s)``, s a left-to-right sum of ``round(c * z)``, on every path."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from zo_core import NOISES, ElementNoise, Noise
from zo_core.noise import Direction
from zo_core.noise.direction import CPU_CHUNK, FLOAT_DTYPES
from zo_core.noise.hashing import BATCH_WORDS
from zo_core.noise.rounding import DROPPED_BITS, rounding_key, stochastic_round

#: Distributions of independent elements; the other noises say where one of these is applied.
ELEMENTS = [noise for noise in map(NOISES.resolve, NOISES) if isinstance(noise, ElementNoise)]
EVERY_NOISE = pytest.mark.parametrize("noise", ELEMENTS, ids=lambda noise: noise.name)
EVERY_DTYPE = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
# torch.compile imports parts of torch that torch has deprecated.
COMPILING = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
THREE = ((7, 1e-3), (8, -0.25), (9, 3.0))
ONE, TWO = THREE[:1], THREE[:2]


def naive(direction: Direction, theta: Tensor, decay: float = 1.0) -> Tensor:
    """The stated formula, for rounding to nearest, on the whole tensor at once."""
    total = None
    for seed, c in direction.terms:
        z = direction.noise.z(seed, direction.slot, 0, theta.numel()).view(theta.shape)
        term = torch.tensor(c, dtype=torch.float32) * z
        total = term if total is None else total + term
    wide = torch.float64 if theta.dtype == torch.float64 else torch.float32
    moved = theta.to(wide) * torch.tensor(decay, dtype=torch.float32).to(wide) + total.to(wide)
    return moved.to(theta.dtype)


def random_weights(shape: list[int], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, dtype=torch.float64, generator=generator) * 0.02).to(dtype)


@EVERY_NOISE
@EVERY_DTYPE
@given(
    shape=st.lists(st.integers(0, 9), max_size=4),
    terms=st.lists(st.tuples(st.integers(0, 2**63), st.floats(-1e3, 1e3)), min_size=1, max_size=4),
    decay=st.sampled_from([1.0, 0.999, 0.5]),
)
def test_moved_weights_are_those_of_the_formula(
    noise: Noise, dtype: torch.dtype, shape: list[int], terms: list[tuple[int, float]], decay: float
) -> None:
    direction = Direction(noise, "w", tuple(terms))
    theta = random_weights(shape, dtype)
    expected = naive(direction, theta, decay)
    out = torch.empty_like(theta)
    before = theta.clone()
    assert direction.add_to(theta, decay, out) is out
    assert torch.equal(out, expected)
    assert torch.equal(theta, before)
    assert direction.add_to(theta, decay) is theta
    assert torch.equal(theta, expected)


@EVERY_NOISE
@EVERY_DTYPE
@pytest.mark.parametrize("size", [1, 33, CPU_CHUNK, CPU_CHUNK + 5, 32 * BATCH_WORDS + CPU_CHUNK + 77])
def test_chunks_do_not_show(noise: Noise, dtype: torch.dtype, size: int) -> None:
    theta = random_weights([size], dtype)
    direction = Direction(noise, "w", THREE)
    assert torch.equal(direction.add_to(theta.clone(), 0.99), naive(direction, theta, 0.99))


@EVERY_NOISE
@pytest.mark.parametrize("dtype", list(DROPPED_BITS), ids=str)
def test_stochastic_rounding_follows_the_index_through_the_chunks(noise: Noise, dtype: torch.dtype) -> None:
    theta = random_weights([2 * CPU_CHUNK + 77], dtype)
    exact = naive(Direction(noise, "w", THREE), theta.float(), 0.99)
    key = rounding_key(5, "w")
    expected = [
        stochastic_round(piece.clone(), dtype, key, 1024 * index) for index, piece in enumerate(exact.split(1024))
    ]
    found = Direction(noise, "w", THREE, rounding_seed=5).add_to(theta, 0.99)
    assert torch.equal(found.float(), torch.cat(expected))


@EVERY_NOISE
def test_values_are_the_sum_that_is_added(noise: Noise) -> None:
    direction = Direction(noise, "w", THREE)
    zeros = torch.zeros(3, CPU_CHUNK)
    assert torch.equal(direction.values(zeros.shape, zeros.device), naive(direction, zeros))


@EVERY_NOISE
@EVERY_DTYPE
@pytest.mark.parametrize("rounding_seed", [None, 5], ids=["nearest", "stochastic"])
def test_strides_do_not_matter(noise: Noise, dtype: torch.dtype, rounding_seed: int | None) -> None:
    direction = Direction(noise, "w", THREE, rounding_seed)
    plain = random_weights([6, 7, 8], dtype)
    expected = direction.add_to(plain.clone(), 0.99)
    for layout in (
        plain.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        plain.repeat_interleave(2, dim=1)[:, ::2],
        torch.cat([plain, plain], dim=2)[..., 8:],
    ):
        assert not layout.is_contiguous()
        out = torch.empty_strided(layout.shape, layout.stride(), dtype=dtype)
        assert torch.equal(direction.add_to(layout, 0.99, out), expected)
        assert torch.equal(direction.add_to(layout, 0.99, torch.empty(6, 7, 8, dtype=dtype)), expected)
        stride = layout.stride()
        assert torch.equal(direction.add_to(layout, 0.99), expected)
        assert layout.stride() == stride


@EVERY_NOISE
def test_a_view_moves_without_its_neighbours(noise: Noise) -> None:
    whole = torch.zeros(4, 10)
    Direction(noise, "w", ONE).add_to(whole[:, 2:5])
    assert (whole[:, 2:5] != 0).all()
    assert torch.equal(whole[:, :2], torch.zeros(4, 2))
    assert torch.equal(whole[:, 5:], torch.zeros(4, 5))


@EVERY_NOISE
def test_coefficients_are_scaled_in_float64_and_rounded_once(noise: Noise) -> None:
    direction = Direction(noise, "w", ((7, 0.1), (8, -0.7)))
    lr = 3e-7
    expected = naive(Direction(noise, "w", ((7, 0.1 * -lr), (8, -0.7 * -lr))), torch.zeros(100))
    assert torch.equal(direction.scaled(-lr).add_to(torch.zeros(100)), expected)


@EVERY_NOISE
def test_opposite_coefficients_move_the_opposite_way(noise: Noise) -> None:
    there = Direction(noise, "w", ONE).add_to(torch.zeros(1000))
    back = Direction(noise, "w", ONE).scaled(-1.0).add_to(torch.zeros(1000))
    assert torch.equal(there, -back)


@pytest.mark.slow
@COMPILING
@EVERY_NOISE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_compiled_pass_gives_the_bits_of_the_eager_one(noise: Noise, dtype: torch.dtype) -> None:
    for terms in (ONE, TWO) if dtype == torch.float32 else (TWO,):
        eager = Direction(noise, "w", terms)
        compiled = dataclasses.replace(eager, backend="compile")
        span = BATCH_WORDS * noise.values_per_word
        for size in (1, 31, 32, 33, 1000, span, span + 1000 + 1):
            theta = random_weights([size], dtype)
            expected = eager.add_to(theta, 0.99, torch.empty_like(theta))
            assert torch.equal(compiled.add_to(theta, 0.99, torch.empty_like(theta)), expected)
            assert torch.equal(compiled.add_to(theta, 0.99), expected)


@pytest.mark.slow
@COMPILING
@EVERY_NOISE
def test_the_compiled_pass_leaves_to_the_eager_one_what_it_has_no_form_for(noise: Noise) -> None:
    for dtype, rounding_seed in ((torch.float64, None), (torch.bfloat16, 5), (torch.float16, 5)):
        theta = random_weights([7, 33], dtype)
        eager = Direction(noise, "w", ONE, rounding_seed)
        compiled = dataclasses.replace(eager, backend="compile")
        assert torch.equal(compiled.add_to(theta.clone()), eager.add_to(theta.clone()))
    transposed = random_weights([7, 33], torch.float32).t()
    eager = Direction(noise, "w", ONE)
    compiled = dataclasses.replace(eager, backend="compile")
    assert torch.equal(compiled.add_to(transposed.clone()), eager.add_to(transposed.clone()))
    assert compiled.add_to(torch.empty(0, 3)).shape == (0, 3)
