"""What the end of streaming leaves behind, and evaluation in inference mode before it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import differing, weights
from models import closure, tiny

from zo_core import ZeroOrder


@pytest.mark.parametrize("tier", ["cpu", "disk"])
def test_close_ends_every_thread_and_the_engine_goes_on_resident(tmp_path: Path, tier: str) -> None:
    folder: dict[str, Any] = {"offload_dir": str(tmp_path)} if tier == "disk" else {}
    streamed, resident = tiny("llama"), tiny("llama")
    threads = set(threading.enumerate())
    zo = ZeroOrder(streamed, lr=1e-3, offload=tier, **folder)
    zo.step(closure("llama", streamed))
    assert set(threading.enumerate()) - threads
    zo.close(torch.device("cpu"))
    assert set(threading.enumerate()) <= threads
    zo.close()
    zo.step(closure("llama", streamed, 1))
    other = ZeroOrder(resident, lr=1e-3)
    for index in range(2):
        other.step(closure("llama", resident, index))
    assert not differing(weights(streamed), weights(resident))


def test_arenas_that_are_dropped_are_kept_from_others_until_their_copies_are_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every sweep ends with a prefetch, so an engine that is dropped without `close` has one under way."""
    zo = ZeroOrder(tiny("llama"), lr=1e-3, offload="cpu")
    assert zo.streaming is not None
    told: dict[int, list[str]] = {}
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda arena, stream: told.setdefault(id(arena), []).append(stream)
    )
    copies = zo.streaming.copies
    copies.incoming, copies.outgoing = "in", "out"
    arena = zo.streaming._arena()
    copies.incoming = copies.outgoing = None
    assert told == {id(arena): ["in", "out"]}
    zo.close()


@pytest.mark.parametrize("tier", ["cpu", "disk"])
def test_a_streamed_model_evaluates_in_inference_mode_and_trains_on(tmp_path: Path, tier: str) -> None:
    folder: dict[str, Any] = {"offload_dir": str(tmp_path)} if tier == "disk" else {}
    losses = []
    for settings in ({"offload": tier, **folder}, {}):
        model = tiny("llama")
        zo = ZeroOrder(model, lr=1e-3, **settings)
        with torch.inference_mode():
            losses.append(float(closure("llama", model)()))
        zo.step(closure("llama", model))
        with torch.inference_mode():
            losses.append(float(closure("llama", model)()))
        zo.close()
    assert losses[:2] == losses[2:]
