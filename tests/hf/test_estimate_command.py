"""Law: `zo-estimate` prints what was counted, in 80 columns, and its errors say what to write."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import batch, tiny
from test_estimate import ROOT, on_meta, rows

from hf_zo.estimate import Row, Workload, as_bars, as_json, as_table, measure_rates, skeleton
from hf_zo.estimate.cli import main

# The command


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny("llama").config.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_table_fits_80_columns(device: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder), "--device", device, "--flops", "1T", "--link", "25GB/s", "--disk", "3e9"]) == 0
    out = capsys.readouterr().out
    assert "all weights, from disk" in out
    assert "█ device  ▒ host  · disk  (each is " in out
    assert max(len(line) for line in out.splitlines() if str(folder) not in line) <= 80


def test_large_numbers_fit_too() -> None:
    row = Row("LoRA 128, int4, from host", *[999 * 10**12] * 5, forwards=2, seconds=1e9)
    assert max(map(len, [*as_table("", [row], Workload()).splitlines(), *as_bars([row]).splitlines()])) <= 80


def test_bars_are_as_long_as_the_numbers() -> None:
    found = [Row("one", 10, host=20, disk=18, forwards=2), Row("two", 24, forwards=2), Row("backprop", 4800)]
    legend, *bars = as_bars(found).splitlines()
    assert "each is 0.0 MB" in legend
    assert [bar[31:] for bar in bars] == ["█" * 10 + "▒" * 20 + "·" * 18, "█" * 24, "█" * 48 + ">"]


def test_the_longest_bar_is_whole_when_some_of_its_parts_are_tiny() -> None:
    _, *bars = as_bars([Row("one", 10**6, host=1, disk=1, forwards=2), Row("backprop", 10**7)]).splitlines()
    assert [bar[31:] for bar in bars] == ["█" * 47 + "▒·", "█" * 48 + ">"]


def test_the_bars_can_be_a_picture(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([str(folder), "--length", "8", "--plot", str(tmp_path / "bars.png")]) == 0
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
    assert main([str(folder), "--length", "8", "--plot", str(tmp_path / "bars.txt")]) == 2
    assert "bars.txt cannot be drawn" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([str(folder), "--length", "8", "--plot", str(tmp_path / "bars.png")]) == 2
    assert "pip install 'zo-trainer[plot]'" in capsys.readouterr().err


def test_json_has_all_numbers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main([str(folder), "--json", "--dtype", "float32", "--device", "cpu", "--batch-size", "2", "--length", "8"])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    (row,) = [row for row in found["rows"] if row["name"] == "all weights, resident"]
    expected = rows(on_meta("llama"))["all weights, resident"]
    assert {**row, "parts": None} == {**json.loads(as_json("", [expected], Workload()))["rows"][0], "parts": None}
    assert row["parts"] == expected.parts


def test_a_skeleton_has_no_values_and_keeps_ties(folder: Path) -> None:
    model = skeleton(str(folder), torch.float16)
    assert all(p.is_meta and p.dtype == torch.float16 for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/nowhere/at/all"], "neither a folder with a config.json"),
        (["FOLDER", "--batch-size", "0"], "batch_size=0 must be a whole number"),
        (["FOLDER", "--estimator", "adam"], "estimator='adam' is not known"),
        (["FOLDER", "--blocks", "layers"], "blocks='layers' is not a module"),
        (["FOLDER", "--lora-targets", "nothing"], "its linear layers are"),
        (["FOLDER", "--lora-targets", "q_proj, vproj"], "lora_targets=vproj are not in the model"),
    ],
)
def test_errors_say_what_to_write(
    arguments: list[str], words: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main([str(folder) if a == "FOLDER" else a for a in arguments]) == 2
    assert words in capsys.readouterr().err


def test_rates_are_measured(tmp_path: Path) -> None:
    rates = measure_rates(torch.device("cpu"), torch.float32, str(tmp_path))
    assert all(rate is not None and 1e6 < rate < 1e15 for rate in (rates.link, rates.disk, rates.flops))
    assert not list(tmp_path.iterdir())


def test_module_and_command_are_the_same() -> None:
    out = subprocess.run(
        [sys.executable, "-m", "hf_zo.estimate", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert out.stdout.startswith("usage: zo-estimate")


def test_batches_of_the_tests_are_those_of_the_estimate() -> None:
    assert tuple(batch("llama")["input_ids"].shape) == (2, 8)


# Against the operating system


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peaks_are_within_ten_percent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With glibc's defaults; without the buffers of MKL where these are a tenth of so small a run by themselves."""
    from benchmarks.estimate import Case, measured, predicted, write_checkpoint

    if torch.backends.cpu.get_cpu_capability() != "AVX512":  # some 10 MB for each thread, see docs/estimate.md
        monkeypatch.setenv("MKL_DISABLE_FAST_MM", "1")
        monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    write_checkpoint(tmp_path, hidden=768, layers=8, vocabulary=32000)
    for case in (Case("resident"), Case("from disk"), Case("from disk", "momentum"), Case("from disk", "sgd", 2)):
        said = sum(predicted(tmp_path, case, 128).values())
        was = measured(tmp_path, case, tokens=128, steps=7, keep=True)
        assert said == pytest.approx(was, rel=0.1), case.name
