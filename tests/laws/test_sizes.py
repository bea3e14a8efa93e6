"""Law: numbers with units are read in one way, wherever they are written."""

from __future__ import annotations

import argparse

import pytest

from hf_zo.estimate.cli import _rate
from zo_core import ConfigError, ZOConfig
from zo_core.sizes import human, parse_bytes, parse_number

READ = {
    "8GB": 8e9,
    "8 gb": 8e9,
    "8G": 8e9,
    "1.5GiB": 1.5 * 2**30,
    "0.5k": 500.0,
    ".5M": 5e5,
    "3e9": 3e9,
    "2e-3T": 2e9,
    "400T": 4e14,
    "1PB": 1e15,
    " 12 ": 12.0,
    "12B": 12.0,
}
REFUSED = ["", "GB", "8 cats", "-8GB", "0", "0GB", "1.2.3", "8GBB", "8iB", "nan", "inf", "1e999", "8GB/s"]


@pytest.mark.parametrize("text", READ)
def test_a_number_with_a_unit(text: str) -> None:
    assert parse_number(text) == READ[text]
    assert parse_bytes(text) == READ[text]
    ZOConfig(offload="auto", device_memory=text)
    assert _rate(text) == _rate(f"{text}/s") == READ[text]


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_none(text: str) -> None:
    with pytest.raises(ValueError):
        parse_number(text)
    with pytest.raises(ConfigError, match="as in '8GB'"):
        ZOConfig(offload="auto", device_memory=text)
    with pytest.raises(argparse.ArgumentTypeError, match="number above 0"):
        _rate(text if text != "8GB/s" else "8GB/s/s")


@pytest.mark.parametrize("value", [0, -1, True, False, "0.5"])
def test_less_than_a_byte_is_no_size(value: object) -> None:
    with pytest.raises(ConfigError, match="as in '8GB'"):
        ZOConfig(offload="auto", device_memory=value)  # type: ignore[arg-type]


def test_bytes_that_are_a_number_stay_exact() -> None:
    assert parse_bytes(None) is None
    assert parse_bytes(2**53 + 1) == 2**53 + 1


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0.0 MB"), (117_440_512, "117.4 MB"), (13_960_000_000, "13.96 GB"), (2_500_000_000_000, "2.50 TB")],
)
def test_in_words(size: int, words: str) -> None:
    assert human(size) == words
