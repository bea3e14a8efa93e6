"""Law: the range test suggests the same rate for a streamed model, leaves it as it was, and holds no copy in memory."""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import differing, weights
from models import closure, tiny
from torch import nn

from zo_core import ConfigError, StateError, ZeroOrder, suggest_lr

ROOT = Path(__file__).parents[2]
SLOW = ((2, "cpu"), (30, "disk"), (100, "cpu"))
METHODS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "momentum": {"rule": "momentum"},
    "low rank": {"noise": "low_rank", "rule": "momentum"},
}


def closures(model: nn.Module) -> list[Callable[[], Any]]:
    """The same random tokens three times: there is nothing to learn from several."""
    return [closure("llama", model)] * 3


def engine(tmp_path: Path, offload: str | None, settings: dict[str, Any]) -> ZeroOrder:
    folder = {"offload_dir": str(tmp_path / "files")} if offload == "disk" else {}
    return ZeroOrder(tiny("llama", layers=3), lr=1e-4, offload=offload, **folder, **settings)


def steps(zo: ZeroOrder, first: int, count: int) -> list[dict[str, Any]]:
    return [zo.step(closure("llama", zo.model, index)).as_dict() for index in range(first, first + count)]


@pytest.mark.parametrize("offload", ["cpu", pytest.param("disk", marks=pytest.mark.slow)])
@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_streamed_is_as_resident(tmp_path: Path, offload: str, settings: dict[str, Any]) -> None:
    """In mid-run, so that there are momentum, windows and pending updates: the same suggestion, and the same steps."""
    plain, tested = (engine(tmp_path, place, settings) for place in (None, offload))
    for zo in (plain, tested):
        steps(zo, 0, 3)
    found = [zo.suggest_lr(closures(zo.model), forwards=200) for zo in (plain, tested)]
    assert [(t.lr, t.change) for t in found[0].curve] == [(t.lr, t.change) for t in found[1].curve]
    assert found[0].lr == found[1].lr
    assert steps(plain, 3, 3) == steps(tested, 3, 3)
    for zo in (plain, tested):
        zo.close()
    assert differing(weights(plain.model), weights(tested.model)) == []


@pytest.mark.parametrize(
    ("calls", "offload"),
    [(2, "disk"), (30, "cpu"), (100, "disk"), *(pytest.param(*slow, marks=pytest.mark.slow) for slow in SLOW)],
)
def test_an_interrupt_leaves_no_trace(tmp_path: Path, offload: str, calls: int) -> None:
    plain, tested = (engine(tmp_path, place, METHODS["momentum"]) for place in (None, offload))
    for zo in (plain, tested):
        steps(zo, 0, 2)
    run, count = closure("llama", tested.model), itertools.count()

    def failing() -> Any:
        if next(count) == calls:
            raise KeyboardInterrupt
        return run()

    with pytest.raises(KeyboardInterrupt):
        tested.suggest_lr([failing] * 3)
    assert steps(plain, 2, 2) == steps(tested, 2, 2)
    for zo in (plain, tested):
        zo.close()
    assert differing(weights(plain.model), weights(tested.model)) == []


@pytest.mark.parametrize("written", [False, True], ids=["steps", "a parameter was written"])
@pytest.mark.parametrize("noise", ["rademacher", "sparse"])
def test_going_back_takes_no_pending_update_along(tmp_path: Path, noise: str, written: bool) -> None:
    """Not its thresholds either, nor what somebody has written into a parameter since."""
    plain, tested = (engine(tmp_path, place, {"noise": noise}) for place in (None, "cpu"))
    for zo in (plain, tested):
        steps(zo, 0, 2)
        before = zo.snapshot()
        steps(zo, 2, 2)
        if written:
            with torch.no_grad():
                next(p for name, p in zo.model.named_parameters() if "layers.0." in name).mul_(0.5)
        before.restore()
    assert steps(plain, 2, 3) == steps(tested, 2, 3)
    assert dict(zip(range(99), plain.optimizer.thresholds.values(), strict=False)) == dict(
        zip(range(99), tested.optimizer.thresholds.values(), strict=False)
    )
    for zo in (plain, tested):
        zo.close()
    assert differing(weights(plain.model), weights(tested.model)) == []


def test_a_model_that_is_streamed_for_the_test_alone() -> None:
    model, other = tiny("llama"), tiny("llama")
    before = weights(model)
    found = suggest_lr(model, closures(model), offload="cpu", forwards=200)
    assert differing(weights(model), before) == []
    assert found.lr == suggest_lr(other, closures(other), forwards=200).lr


@pytest.mark.slow
def test_auto_with_a_streamed_model() -> None:
    models = [tiny("llama"), tiny("llama")]
    engines = [ZeroOrder(models[0], lr="auto"), ZeroOrder(models[1], lr="auto", offload="cpu")]
    losses = [
        [float(zo.step(closure("llama", model, i))) for i in range(3)]
        for model, zo in zip(models, engines, strict=True)
    ]
    assert losses[0] == losses[1]
    assert engines[0].lr == engines[1].lr


# The files


def test_the_files_are_in_offload_dir_and_go(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    zo = engine(tmp_path, "disk", {})
    with caplog.at_level(logging.INFO, "zo_core"):
        before = zo.snapshot()
    (folder,) = (tmp_path / "files").glob("zo-snapshot-*")
    assert any(str(folder) in message and " of streamed weights are kept in " in message for message in caplog.messages)
    del before
    assert not folder.exists()


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_a_full_disk_is_an_error_that_changes_nothing(
    tmp_path: Path, offload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, tested = (engine(tmp_path, place, {}) for place in (None, offload))
    for zo in (plain, tested):
        steps(zo, 0, 2)
        zo.flush()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "files").mkdir(exist_ok=True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "files"))
    with monkeypatch.context() as patch:
        patch.setattr("zo_core.streaming.store.write_file", full)
        with pytest.raises(StateError, match=r"could not be written to .*No space left.*set offload_dir"):
            tested.suggest_lr(closures(tested.model))
    assert not list((tmp_path / "files").glob("zo-snapshot-*"))
    assert steps(plain, 2, 2) == steps(tested, 2, 2)


def test_momentum_of_another_engine_is_not_lost() -> None:
    zo = ZeroOrder(tiny("llama"), offload="cpu", rule="momentum")
    with pytest.raises(ConfigError, match=r"streamed for another engine, .* pass optimizer=zo\.optimizer"):
        suggest_lr(zo.model, closures(zo.model), rule="momentum")


# Memory

MEMORY = """
import ctypes, torch
from torch import nn
from zo_core import ZeroOrder

def anonymous():
    ctypes.CDLL(None).malloc_trim(0)
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(16)))  # 64 MiB in blocks of 4
zo = ZeroOrder(model, offload="disk", blocks=[str(i) for i in range(16)], rule="momentum", lr=1e-6)
x, most = torch.randn(4, 1024), 0

def loss():
    global most
    value = model(x).square().mean()
    most = max(most, anonymous())
    return value

for _ in range(3):
    zo.step(loss)
zo.flush()
print(most)
most = 0
found = zo.suggest_lr([loss], forwards=128)
print(most)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_that_of_streaming() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", MEMORY]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    streaming, testing = map(float, result.stdout.split())
    assert testing < streaming + 12.0  # MiB; a copy has 64, with momentum 128
