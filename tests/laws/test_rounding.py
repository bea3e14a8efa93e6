"""Law: stochastic rounding goes to one of the two neighbours, never moves what fits, and is right on average."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from zo_core import NOISES
from zo_core.noise import Direction
from zo_core.noise.hashing import ROUNDING_SPAN
from zo_core.noise.rounding import DROPPED_BITS, rounding_key, stochastic_round

EVERY_16_BIT_TYPE = pytest.mark.parametrize("dtype", list(DROPPED_BITS), ids=str)
KEYS = [rounding_key(seed, "w") for seed in range(8)]
SIGMAS = 5.0

#: fp16 values below 2**-14 are rounded by 13 random bits, so the probability to go up is a multiple of 2**-13.
GRAIN = 2.0**-13


def representable(dtype: torch.dtype) -> Tensor:
    """All finite values of a 16-bit type, ascending, in float32."""
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    return values[values.isfinite()].unique()


def neighbours(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The largest representable value at or below each value, and the smallest at or above it."""
    grid = representable(dtype)
    return grid[torch.searchsorted(grid, values, right=True) - 1], grid[torch.searchsorted(grid, values)]


def magnitudes(dtype: torch.dtype) -> Tensor:
    """Values of both signs over the whole range of a type, most of them between two representable ones."""
    top = math.log2(torch.finfo(dtype).max)
    bottom = math.log2(torch.finfo(dtype).smallest_normal) - 12
    generator = torch.Generator().manual_seed(0)
    exponents = torch.empty(20_000, dtype=torch.float64).uniform_(bottom, top - 1, generator=generator)
    signs = torch.randint(0, 2, (20_000,), generator=generator) * 2 - 1
    return (2.0**exponents * signs).float()


@EVERY_16_BIT_TYPE
def test_every_representable_value_is_unchanged_whatever_the_bits(dtype: torch.dtype) -> None:
    values = representable(dtype)
    for key in KEYS:
        assert torch.equal(stochastic_round(values.clone(), dtype, key, 0), values)


@EVERY_16_BIT_TYPE
@pytest.mark.parametrize("special", [math.inf, -math.inf, math.nan])
def test_infinities_and_nan_stay_what_they_are(dtype: torch.dtype, special: float) -> None:
    values = torch.full((100,), special)
    for key in KEYS:
        rounded = stochastic_round(values.clone(), dtype, key, 0).to(dtype).float()
        assert torch.equal(rounded.nan_to_num(nan=1.5), values.nan_to_num(nan=1.5))


@EVERY_16_BIT_TYPE
@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000, -4194304], ids=hex)
def test_every_pattern_of_bits_that_is_nan_stays_nan(dtype: torch.dtype, bits: int) -> None:
    """A GPU writes NaN as 0x7fffffff, and one more is -0.0."""
    values = torch.full((100,), bits, dtype=torch.int32).view(torch.float32)
    for key in KEYS:
        assert stochastic_round(values.clone(), dtype, key, 0).isnan().all()


@EVERY_16_BIT_TYPE
def test_the_result_is_one_of_the_two_neighbours_and_both_occur(dtype: torch.dtype) -> None:
    values = magnitudes(dtype)
    low, high = neighbours(values, dtype)
    assert (low < high).sum() > 15_000  # most of them have a choice
    ups = torch.zeros(len(values))
    for key in KEYS:
        rounded = stochastic_round(values.clone(), dtype, key, 0)
        assert torch.equal(rounded.to(dtype).float(), rounded)
        assert ((rounded == low) | (rounded == high)).all()
        ups += rounded == high
    # Each of them goes up in some of 8 tries and not in all, unless it is close to a neighbour.
    middling = ((values - low) / (high - low) - 0.5).abs() < 0.25
    assert (ups[middling] > 0).float().mean() > 0.9
    assert (ups[middling] < 8).float().mean() > 0.9


@EVERY_16_BIT_TYPE
@pytest.mark.parametrize("value", [0.02, -0.02, 1.7, -300.3, 3.1e-5, -3.1e-5, 6.3e-8, -4.4e-8])
@pytest.mark.parametrize("over", ["elements", "seeds"])
def test_the_mean_is_the_value(dtype: torch.dtype, value: float, over: str) -> None:
    """Over the elements of one tensor, and over the steps that visit one element."""
    if over == "elements":
        exact = torch.full((1 << 17,), value)
        rounded = stochastic_round(exact.clone(), dtype, KEYS[0], 0)
    else:
        exact = torch.full((1 << 8,), value)
        keys = [rounding_key(seed, "w") for seed in range(1 << 8)]
        rounded = torch.cat([stochastic_round(exact[:7].clone(), dtype, key, 0)[6:] for key in keys])
    low, high = neighbours(exact[:1], dtype)
    step, chance = (high - low).item(), ((exact[0] - low) / (high - low)).item()
    # One rounding has the standard deviation step * sqrt(p (1 - p)), p the chance to go up.
    bound = SIGMAS * step * math.sqrt(chance * (1 - chance) / len(exact))
    if dtype == torch.float16 and abs(value) < 2.0**-14:
        bound += GRAIN * step
    assert 0.0 < chance < 1.0
    assert abs(rounded.double().mean().item() - exact[0].item()) <= bound


@EVERY_16_BIT_TYPE
def test_rounding_is_a_function_of_seed_slot_and_index(dtype: torch.dtype) -> None:
    values = magnitudes(dtype)
    whole = stochastic_round(values.clone(), dtype, KEYS[0], 0)
    parts = [stochastic_round(values[at : at + 1024].clone(), dtype, KEYS[0], at) for at in range(0, len(values), 1024)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(stochastic_round(values.clone(), dtype, KEYS[1], 0), whole)


@EVERY_16_BIT_TYPE
@pytest.mark.parametrize("other", ["slot", "span", "seed", "neighbour"])
def test_any_two_roundings_of_a_run_are_independent(dtype: torch.dtype, other: str) -> None:
    """Of one element in two slots, in two spans of a slot, at two steps; and of two elements of a span."""
    size = ROUNDING_SPAN
    halfway = torch.full((size,), 1 + torch.finfo(dtype).eps / 2)

    def ups(seed: int, slot: str, start: int) -> Tensor:
        return (stochastic_round(halfway.clone(), dtype, rounding_key(seed, slot), start) > 1).double() - 0.5

    # One pair of masks may agree in a bit that decides; over many pairs that averages out.
    products = []
    for pair in range(64):
        first = ups(pair, "a", 0)
        second = {
            "slot": lambda pair=pair: ups(pair, "b", 0),
            "span": lambda pair=pair: ups(pair, "a", size),
            "seed": lambda pair=pair: ups(pair + 64, "a", 0),
            "neighbour": lambda first=first: first.roll(1),
        }[other]()
        products.append((first * second).mean().item() * 4)
    # Where a mask is shared by all elements a pair gives +1 or -1, and the mean of 64 of those has the
    # standard deviation 1/8; elsewhere it is smaller.
    assert abs(sum(products) / len(products)) <= SIGMAS / 8


@EVERY_16_BIT_TYPE
def test_rounding_up_does_not_follow_the_direction(dtype: torch.dtype) -> None:
    """The bits that round are not those that chose the sign, although both come from one seed and slot."""
    size = 1 << 18
    z = NOISES.resolve("rademacher").z(5, "w", 0, size)
    theta = torch.full((size,), 0.02).to(dtype)
    still = Direction(NOISES.resolve("rademacher"), "w", ((5, 0.0),), rounding_seed=5)
    low, high = neighbours(torch.tensor([0.9999 * theta[0].item()]), dtype)
    up = still.add_to(theta, decay=0.9999).float() == high
    chance = up.double().mean().item()
    assert low < high
    assert 0.1 < chance < 0.99
    # The mean of N products of z with an independent variable of variance p (1 - p).
    bound = SIGMAS * math.sqrt(chance * (1 - chance) / size)
    assert abs((z * (up.float() - chance)).double().mean().item()) <= bound


@EVERY_16_BIT_TYPE
def test_updates_far_below_one_unit_in_the_last_place_arrive_on_average(dtype: torch.dtype) -> None:
    size, move = 1 << 20, 1e-6
    noise = NOISES.resolve("rademacher")
    z = noise.z(5, "w", 0, size)
    theta = torch.full((size,), 0.02).to(dtype)
    stochastic = Direction(noise, "w", ((5, move),), rounding_seed=5).add_to(theta.clone())
    arrived = ((stochastic.double() - theta.double()) * z).mean().item()
    ulp = 2.0**-13 if dtype == torch.bfloat16 else 2.0**-16  # of 0.02, between 2**-6 and 2**-5
    # Each element moves by one ulp with the chance move / ulp, else not at all.
    assert abs(arrived - move) <= SIGMAS * ulp * math.sqrt(move / ulp / size)
    nearest = Direction(noise, "w", ((5, move),)).add_to(theta.clone())
    assert torch.equal(nearest, theta)  # while rounding to nearest loses the whole update
