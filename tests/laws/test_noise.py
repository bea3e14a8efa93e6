"""Law: z is a pure function of (seed, slot, index), with the distribution it states, whoever computes it."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from traces import generators

from zo_core import NOISES, ElementNoise, Noise, derive_seed
from zo_core.cache import ByteCache, clear_caches
from zo_core.noise import hashing
from zo_core.noise.gaussian import LEVELS, quantiles
from zo_core.noise.hashing import DIRECTION, ROUNDING, ROUNDING_SPAN, rounding_bits, stream_key, words
from zo_core.noise.rounding import rounding_key

CPU = torch.device("cpu")
#: Distributions of independent elements; the other noises say where one of these is applied.
ELEMENTS = [noise for noise in map(NOISES.resolve, NOISES) if isinstance(noise, ElementNoise)]
EVERY_NOISE = pytest.mark.parametrize("noise", ELEMENTS, ids=lambda noise: noise.name)
SEEDS = st.integers(-(2**63), 2**64)
SLOTS = st.text(max_size=20)

#: Samples of a statistical test, and how far a mean may be from its expectation, in standard errors.
#: About 300 means are checked below: with fixed, good bits one beyond five has a chance of 2e-4.
SAMPLES, SIGMAS = 1 << 20, 5.0


# Purity


@EVERY_NOISE
@given(seed=SEEDS, slot=SLOTS, cuts=st.lists(st.integers(0, 3000), min_size=3, max_size=3))
def test_a_slice_does_not_depend_on_where_it_was_cut(noise: Noise, seed: int, slot: str, cuts: list[int]) -> None:
    start, middle, stop = sorted(cuts)
    whole = noise.z(seed, slot, 0, 3000)
    assert torch.equal(noise.z(seed, slot, start, stop), whole[start:stop])
    assert torch.equal(
        torch.cat([noise.z(seed, slot, start, middle), noise.z(seed, slot, middle, stop)]), whole[start:stop]
    )


@EVERY_NOISE
@pytest.mark.parametrize("around_word", [0, hashing.BATCH_WORDS, 1 << 31, 1 << 32, 3 << 32])
def test_slices_agree_across_the_places_where_the_counter_turns_over(noise: Noise, around_word: int) -> None:
    middle = around_word * noise.values_per_word
    start, stop = max(0, middle - 77), middle + 99
    whole = noise.z(5, "w", start, stop)
    parts = [noise.z(5, "w", at, min(at + 7, stop)) for at in range(start, stop, 7)]
    assert torch.equal(torch.cat(parts), whole)


@EVERY_NOISE
def test_far_away_words_are_not_the_first_ones_again(noise: Noise) -> None:
    first = noise.z(5, "w", 0, 4096)
    for word in (1 << 31, 1 << 32, 3 << 32):
        start = word * noise.values_per_word
        # 4096 products of independent values of variance 1: standard error 1/64.
        assert abs((first * noise.z(5, "w", start, start + 4096)).mean().item()) < SIGMAS / 64


@EVERY_NOISE
def test_the_order_of_questions_and_a_cold_cache_do_not_matter(noise: Noise) -> None:
    questions = [(seed, slot) for seed in (0, 1, 2) for slot in ("a", "b")]
    forwards = {q: noise.z(*q, 0, 1000) for q in questions}
    clear_caches()
    backwards = {q: noise.z(*q, 0, 1000) for q in reversed(questions)}
    assert all(torch.equal(forwards[q], backwards[q]) for q in questions)


def test_words_are_the_same_when_there_is_no_room_to_keep_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "_words", ByteCache(10_000))
    fresh = {seed: words((seed, seed), 0, 300, CPU).clone() for seed in range(10)}
    assert len(hashing._words) == 3
    assert all(torch.equal(words((seed, seed), 0, 300, CPU), fresh[seed]) for seed in fresh)


@EVERY_NOISE
def test_expanding_words_does_not_change_them(noise: Noise) -> None:
    bits = words(stream_key(3, "w", DIRECTION), 0, 100, CPU)
    before = bits.clone()
    noise.expand(bits, 0.5, torch.empty(100 * noise.values_per_word))
    assert torch.equal(bits, before)


@EVERY_NOISE
@pytest.mark.parametrize("scale", [1e-3, -1e-3, 0.0, 3e-39, 1e30])
def test_the_scale_multiplies_each_element_and_rounds_once(noise: Noise, scale: float) -> None:
    expected = noise.z(5, "w", 0, 1000) * torch.tensor(scale, dtype=torch.float32)
    assert torch.equal(noise.z(5, "w", 0, 1000, scale=float(torch.tensor(scale))), expected)


@EVERY_NOISE
def test_drawing_touches_no_global_generator(noise: Noise) -> None:
    before = generators()
    noise.z(5, "w", 0, 1000)
    assert generators() == before


@pytest.mark.usefixtures("cold_caches")
@EVERY_NOISE
def test_inference_mode_leaves_nothing_behind_that_breaks_later_calls(noise: Noise) -> None:
    with torch.inference_mode():
        inside = noise.z(5, "w", 0, 1000).clone()
    for seed in (6, 5):  # new words, and those first drawn in inference mode
        outside = noise.z(seed, "w", 0, 1000)
        assert not outside.is_inference()
    assert torch.equal(inside, outside)
    assert torch.equal(outside.requires_grad_().sum(), inside.sum())


# The bits


def mix32(x: int) -> int:
    """The public lowbias32 finaliser."""
    x ^= x >> 16
    x = x * 0x7FEB352D & hashing.MASK32
    x ^= x >> 15
    x = x * 0x846CA68B & hashing.MASK32
    return x ^ x >> 16


@given(
    low=st.integers(-(2**31), 2**31 - 1),
    high=st.integers(-(2**31), 2**31 - 1),
    start=st.integers(0, 2**36),
    count=st.integers(1, 5),
)
def test_words_are_two_rounds_of_lowbias32_in_plain_integers(low: int, high: int, start: int, count: int) -> None:
    twice = []
    for index in range(start, start + count):
        base = low + (start >> 32) * 0x9E3779B9 & hashing.MASK32
        word = mix32(base ^ index & hashing.MASK32)
        twice.append(hashing.signed(mix32(word + high & hashing.MASK32)))
    assert words((low, high), start, count, CPU).tolist() == twice


@given(
    low=st.integers(-(2**31), 2**31 - 1),
    high=st.integers(-(2**31), 2**31 - 1),
    start=st.integers(0, 2**40),
    dropped=st.sampled_from([13, 16]),
)
@settings(max_examples=25)
def test_rounding_bits_are_a_table_and_a_mask_in_plain_integers(low: int, high: int, start: int, dropped: int) -> None:
    count = min(5, ROUNDING_SPAN - start % ROUNDING_SPAN)
    expected = []
    for index in range(start, start + count):
        span, at = divmod(index, ROUNDING_SPAN)
        half = mix32(low & hashing.MASK32 ^ at // 2) >> 16 * (at % 2)
        mask = mix32(high + span * 0x9E3779B9 & hashing.MASK32)
        expected.append((half ^ mask) & (1 << dropped) - 1)
    assert rounding_bits((low, high), dropped, start, count, CPU).tolist() == expected


def test_the_bits_never_change_silently() -> None:
    """Logs of seeds outlive versions. A change here makes every log written before unreadable."""
    assert [derive_seed(0, 0, 0), derive_seed(0, 0, 1), derive_seed(0, 1, 0), derive_seed(-1, 0, 0)] == [
        1279368494785126216,
        1700482428262628912,
        2482289063980384216,
        9079841259257991405,
    ]
    assert stream_key(1, "w", DIRECTION) == (1781420942, 1598570576)
    assert stream_key(1, "w", ROUNDING) == (-328165781, 1945025546)
    assert stream_key(2**63 - 1, "layers.0.weight", DIRECTION) == (1679120263, -387160717)
    key = stream_key(1, "w", DIRECTION)
    assert words(key, 0, 4, CPU).tolist() == [-859509862, 1837371471, 2087865132, 534222535]
    assert words(key, 1 << 33, 2, CPU).tolist() == [71479132, -363843174]
    assert rounding_bits(rounding_key(1, "w"), 16, 0, 4, CPU).tolist() == [64479, 55665, 55412, 47199]
    signs = "".join("+" if value > 0 else "-" for value in NOISES.resolve("rademacher").z(1, "w", 0, 32).tolist())
    assert signs == "+-+--++---+-+---++-+++--++--++--"
    normal = [value.hex() for value in NOISES.resolve("gaussian").z(1, "w", 0, 4).tolist()]
    assert normal == ["0x1.6843be0000000p+0", "0x1.aeaed00000000p-1", "-0x1.863b8c0000000p+0", "-0x1.74adc80000000p-3"]
    digest = hashlib.sha256(quantiles().numpy().tobytes()).hexdigest()
    assert digest == "8babbcaf96568f10165a1eab530c0e5c92d04de96761b6dbb3dadfa94baba37f"


def test_seeds_of_all_steps_and_directions_differ_and_fit_63_bits() -> None:
    seeds = {derive_seed(base, step, i) for base in (0, 1, -1, 2**64) for step in range(500) for i in range(8)}
    # 2**64 is 0 again: seeds are taken modulo 2**64.
    assert len(seeds) == 3 * 500 * 8
    assert all(0 <= seed < 2**63 for seed in seeds)


# The distribution


def test_the_gaussian_table_has_exactly_the_stated_moments() -> None:
    values = quantiles().double()
    # Each of the 65,536 values is a real number rounded to float32, a relative error of at most 2**-24, so
    # their squares are off by 2**-23 relative and a mean of squares of 1 by 2**-23.
    assert abs(values.square().mean().item() - NOISES.resolve("gaussian").variance) < 2**-23
    # The kurtosis is stated to five decimals.
    kurtosis = (values**4).mean().item() / values.square().mean().item() ** 2
    assert abs(kurtosis - NOISES.resolve("gaussian").kurtosis) <= 0.5e-5
    assert values.numel() == LEVELS
    assert torch.equal(values, -values.flip(0))
    assert (values.diff() > 0).all()


@EVERY_NOISE
def test_mean_and_second_moment_are_the_stated_ones(noise: Noise) -> None:
    for seed in range(5):
        z = noise.z(derive_seed(0, seed, 0), "w", 0, SAMPLES).double()
        assert abs(z.mean().item()) <= SIGMAS * math.sqrt(noise.variance / SAMPLES)
        # The variance of z**2 is (kurtosis - 1) * variance**2; 2**-23 is the rounding of the table.
        bound = SIGMAS * noise.variance * math.sqrt((noise.kurtosis - 1) / SAMPLES) + 2**-23
        assert abs(z.square().mean().item() - noise.variance) <= bound


@EVERY_NOISE
@pytest.mark.parametrize("lag", [1, 2, 3, 7, 16, 31, 32, 33, 64, 1024, hashing.BATCH_WORDS, 1 << 18])
def test_elements_are_uncorrelated_along_a_slot(noise: Noise, lag: int) -> None:
    for seed in range(4):
        z = noise.z(seed, "w", 0, SAMPLES + lag).double()
        assert_uncorrelated(z[:-lag], z[lag:])
        if noise.kurtosis > 1:  # the squares of signs are constant
            squares = z.square() - z.square().mean()
            assert_uncorrelated(squares[:-lag], squares[lag:])


@EVERY_NOISE
def test_neighbouring_seeds_steps_directions_and_slots_are_uncorrelated(noise: Noise) -> None:
    streams = [(0, "w"), (1, "w"), (2, "w"), (1 << 32, "w"), (0, "layers.0.w"), (0, "layers.1.w"), (0, "")]
    streams += [(derive_seed(0, step, i), "w") for step in (0, 1) for i in (0, 1)]
    drawn = [noise.z(seed, slot, 0, 1 << 18).double() for seed, slot in streams]
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert_uncorrelated(a, b)


def assert_uncorrelated(a: Tensor, b: Tensor) -> None:
    # The mean of N products of independent values has the standard error sqrt(E a^2 E b^2 / N).
    bound = SIGMAS * math.sqrt(a.square().mean().item() * b.square().mean().item() / a.numel())
    assert abs((a * b).mean().item()) <= bound


@EVERY_NOISE
@pytest.mark.parametrize("stride", [1, 32, 33])
def test_all_patterns_of_eight_signs_are_equally_frequent(noise: Noise, stride: int) -> None:
    windows = 1 << 16
    z = noise.z(11, "w", 0, windows * 8 * stride)
    bits = (z.view(windows, 8, stride)[:, :, 0] > 0).long()
    counts = torch.bincount((bits << torch.arange(8)).sum(1), minlength=256).double()
    expected = windows / 256
    chi2 = ((counts - expected).square() / expected).sum().item()
    # Chi-squared with 255 degrees of freedom: mean 255, standard deviation sqrt(2 * 255).
    assert abs(chi2 - 255) < SIGMAS * math.sqrt(2 * 255)


def test_every_bit_of_a_word_is_even_in_both_kinds_of_stream() -> None:
    count = hashing.BATCH_WORDS
    for bits, width in (
        (words(stream_key(3, "w", DIRECTION), 0, count, CPU), 32),
        (rounding_bits((5, 9), 16, 0, count, CPU), 16),
    ):
        ones = torch.stack([(bits >> shift & 1).double().mean() for shift in range(width)])
        # A fair bit has the standard deviation 1/2.
        assert (ones - 0.5).abs().max().item() <= SIGMAS * 0.5 / math.sqrt(count)


def test_the_gaussian_draws_every_level_equally_often() -> None:
    z = NOISES.resolve("gaussian").z(13, "w", 0, 32 * LEVELS)
    counts = torch.bincount(torch.searchsorted(quantiles(), z), minlength=LEVELS).double()
    chi2 = ((counts - 32).square() / 32).sum().item()
    # As above, with LEVELS - 1 degrees of freedom.
    assert abs(chi2 - (LEVELS - 1)) < SIGMAS * math.sqrt(2 * (LEVELS - 1))
