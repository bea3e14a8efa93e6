"""Law: `zo-seedlog` shows, verifies and replays what is in a log, or says what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from logged_run import STEPS, LoggedRun, logged_run
from safetensors.torch import load_file, save_file
from traces import same_bits

from zo_core.seedlog import __main__ as command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> LoggedRun:
    return logged_run(tmp_path_factory.mktemp("run") / "log")


def test_show_says_what_the_run_was(
    run: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert command.main(["show", str(run[0])]) == 0
    path, *lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join([path, *lines]).split())
    assert "steps 0 to 4" in text
    assert "estimator spsa, 1 directions, noise rademacher, rule sgd" in text
    assert "root mean square" in text
    assert text.count("•") == STEPS


def test_show_draws_a_picture_where_matplotlib_is(run: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert command.main(["show", str(run[0]), "--png", str(tmp_path / "curve.png")]) == 0
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_verify_is_right_or_says_what_is_wrong(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base.safetensors"
    save_file(dict(run[1][0]), base)
    assert command.main(["verify", str(run[0]), "--base", str(base)]) == 0
    assert "every checksum right" in capsys.readouterr().out
    save_file(dict(run[1][2]), base)
    assert command.main(["verify", str(run[0]), "--base", str(base)]) == 1
    assert "began with other weights" in capsys.readouterr().err
    (tmp_path / "log").write_bytes(run[0].read_bytes()[:-24] + b"\0" * 24)
    assert command.main(["verify", str(tmp_path / "log")]) == 1
    assert "is corrupt at byte" in capsys.readouterr().err
    assert command.main(["show", str(tmp_path / "log")]) == 1
    assert "is corrupt at byte" in " ".join(capsys.readouterr().out.split())  # lines are wrapped


@pytest.mark.parametrize("prefix", ["", "model.", "module."])
def test_replay_writes_the_trained_weights(prefix: str, run: Any, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out.safetensors"
    base.mkdir()
    names = sorted(run[1][0])
    for number, part in enumerate((names[:3], names[3:])):  # two shards
        save_file({prefix + name: run[1][0][name] for name in part}, base / f"model-{number}.safetensors")
    assert command.main(["replay", str(run[0]), "--base", str(base), "--out", str(out)]) == 0
    assert same_bits(load_file(out), {prefix + name: value for name, value in run[1][-1].items()})
    assert command.main(["replay", str(run[0]), "--base", str(base), "--out", str(out), "--until", "2"]) == 0
    assert same_bits(load_file(out), {prefix + name: value for name, value in run[1][2].items()})


def test_tensors_that_did_not_move_are_kept_whatever_their_names(run: Any, tmp_path: Path) -> None:
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    packed = {"q.weight": torch.arange(3, dtype=torch.uint8), "q.weight.absmax": torch.ones(3)}  # as 4-bit ones are
    save_file(run[1][0] | packed, base)
    assert command.main(["verify", str(run[0]), "--base", str(base)]) == 0
    assert command.main(["replay", str(run[0]), "--base", str(base), "--out", str(out)]) == 0
    assert same_bits(load_file(out), run[1][-1] | packed)


def test_a_base_that_is_none_is_a_clear_error(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base.safetensors"
    arguments = ["replay", str(run[0]), "--base", str(base), "--out", str(tmp_path / "out")]
    assert command.main(arguments) == 1
    assert "cannot be read" in capsys.readouterr().err
    save_file({"foreign": torch.zeros(3)}, base)
    assert command.main(arguments) == 1
    assert "none of the 6 tensors" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
