"""Law: Triton is chosen where it can compile a kernel, which is tried out once; elsewhere the noise is eager."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import closure, tiny
from torch import nn

import zo_core.config as config
import zo_core.placement as placement
from zo_core import ZeroOrder, ZOConfig


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with the package and a device, as far as the settings can see; models compute on the CPU."""
    monkeypatch.setattr(config, "has_triton", lambda: True)
    monkeypatch.setattr(placement, "_cuda_device", lambda *_: torch.device("cpu"))
    monkeypatch.setattr(placement, "_try_kernel", lambda device: None)
    clear = placement.triton_works.cache_clear
    clear()
    yield
    clear()


def test_without_a_compiler_the_noise_is_eager(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries = []

    def fails(device: torch.device) -> None:
        tries.append(device)
        raise RuntimeError("Failed to find C compiler. Please specify via CC\nmore lines")

    monkeypatch.setattr(placement, "_try_kernel", fails)
    for _ in range(2):
        model = tiny("mlp")
        zo = ZeroOrder(model, lr=1e-3)
        assert zo.backend == "eager"
        zo.step(closure("mlp", model))
    assert len(tries) == 1
    said = [record.getMessage() for record in caplog.records if "Triton" in record.getMessage()]
    assert len(said) == 1
    assert "Failed to find C compiler. Please specify via CC)" in said[0]
    assert "more lines" not in said[0]


def test_what_works_and_what_was_asked_for_stays() -> None:
    assert ZeroOrder(tiny("mlp"), lr=1e-3).backend == "triton"
    assert ZeroOrder(tiny("mlp"), lr=1e-3, backend="triton").backend == "triton"
    assert ZeroOrder(tiny("mlp"), lr=1e-3, backend="eager").backend == "eager"


def test_nothing_is_tried_for_a_model_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would start CUDA in a process that does not use it."""
    monkeypatch.undo()
    monkeypatch.setattr(config, "has_triton", lambda: True)
    monkeypatch.setattr(placement, "triton_works", lambda device: pytest.fail("tried"))
    ZeroOrder(tiny("mlp"), lr=1e-3)


def test_the_device_is_where_the_model_will_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = tiny("llama")
    assert placement._cuda_device(model, ZOConfig()) is None
    assert placement._cuda_device(model, ZOConfig(offload="cpu", device="cuda:1")) == torch.device("cuda:1")

    class OnCuda(nn.Module):
        def parameters(self, recurse: bool = True) -> Any:
            class There:
                device = torch.device("cuda:0")

            yield There()

    assert placement._cuda_device(OnCuda(), ZOConfig()) == torch.device("cuda:0")
