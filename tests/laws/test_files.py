"""Law: a file that is replaced is the old one or the new one, whole, and what was replaced survives a loss of power."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import closure, tiny
from safetensors.torch import save_model

from zo_core import LowRank, SeedLogWriter, ZeroOrder, save_adapter, seedlog
from zo_core.files import replacing, write_whole
from zo_core.seedlog.__main__ import main as command
from zo_core.streaming.store import DiskStore


def record(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path]]:
    """What is synced and renamed from here on, in order."""
    events: list[tuple[str, Path]] = []
    fsync, move = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        events.append((kind, Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def replaced(source: Path, target: Path) -> None:
        events.append(("replace", Path(target)))
        move(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    return events


def safely_written(events: list[tuple[str, Path]], folder: Path) -> set[str]:
    """Names of the files of which data, then name, then folder went to the disk."""
    names = set()
    for at, (event, path) in enumerate(events):
        if event == "replace":
            assert events[at - 1] == ("file", path.with_name(f"{path.name}.tmp"))
            assert events[at + 1] == ("folder", folder)
            names.add(path.name)
    return names


def test_data_then_name_then_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = record(monkeypatch)
    write_whole(tmp_path / "a", b"new")
    assert events == [("file", tmp_path / "a.tmp"), ("replace", tmp_path / "a"), ("folder", tmp_path)]
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"new")]


def blocks(folder: Path) -> None:
    DiskStore(folder).put("a.0", {"weight": torch.ones(3)})


def log(folder: Path) -> None:
    model = tiny("llama", tied=False)
    zo = ZeroOrder(model, lr=1e-3)
    writer = SeedLogWriter.attach(zo, folder / "seedlog.zo")
    zo.step(closure("llama", model))
    writer.close()


def shared_log(folder: Path) -> None:
    log(folder)
    seedlog.save_adapter(folder / "seedlog.zo", folder)


def lora(folder: Path) -> None:
    model = tiny("llama").requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.requires_grad_(True)
    zo = ZeroOrder(model, lr=1e-3, noise=LowRank(refresh=None))
    zo.step(closure("llama", model))
    save_adapter(zo, folder)


def replayed(folder: Path) -> None:
    save_model(tiny("llama", tied=False), str(folder / "base"))
    log(folder)
    arguments = [folder / "seedlog.zo", "--base", folder / "base", "--out", folder / "out"]
    assert command(["replay", *map(str, arguments)]) == 0


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (blocks, {"a.0.safetensors"}),
        (log, {"seedlog.zo"}),
        (shared_log, {"seedlog.zo", "zo_adapter.json", "README.md"}),
        (lora, {"adapter_model.safetensors", "adapter_config.json"}),
        (replayed, {"seedlog.zo", "out"}),
    ],
)
def test_everything_that_is_written_is_written_so(
    make: Callable[[Path], None], names: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = record(monkeypatch)
    make(tmp_path)
    assert safely_written(events, tmp_path) == names
    assert {path.name for path in tmp_path.iterdir()} - {"base"} == names


@pytest.mark.parametrize("step", ["body", "fsync", "replace"])
def test_a_failure_leaves_the_old_file(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "a", b"old")

    def fail(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if step != "body":
        monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space left"), replacing(tmp_path / "a") as fresh:  # noqa: PT012
        fresh.write_bytes(b"half of the n")
        if step == "body":
            fail()
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]


@pytest.mark.parametrize(("number", "raises"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_folder_that_cannot_be_synced_is_no_error_and_one_that_fails_is(
    number: int, raises: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems have no way to sync a folder; a damaged disk is another thing."""
    fsync = os.fsync

    def odd(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", odd)
    if raises:
        with pytest.raises(OSError, match=os.strerror(number)):
            write_whole(tmp_path / "a", b"new")
    else:
        write_whole(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
