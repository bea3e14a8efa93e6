"""Bad input and accidents: a clear error, and nothing harmed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from offload_helpers import deep, make
from torch import Tensor
from transformers import AlbertConfig, AlbertForMaskedLM

from zo_core import ConfigError, ModelError, StateError, ZeroOrder, ZOError

pytestmark = pytest.mark.usefixtures("no_probe_thread_is_left")


def test_an_exception_in_a_probe_harms_nothing() -> None:
    model, inputs = make("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    zo = ZeroOrder(model, lr=1e-3, offload="cpu")
    calls = []

    def failing() -> Tensor:
        calls.append(None)
        loss = model(**inputs).loss
        if len(calls) == 3:  # of two probes in turns, after one that looked
            raise KeyError("second probe")
        return loss

    with pytest.raises(KeyError, match="second probe"):
        zo.step(failing)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert zo.step(lambda: model(**inputs).loss).skipped is None


def test_a_torch_optimizer_needs_all_weights_at_once() -> None:
    model, _ = make("llama")
    with pytest.raises(ConfigError, match="one layer at a time"):
        ZeroOrder(model, offload="cpu", optimizer=torch.optim.Adam(model.parameters()))


def test_a_model_without_repeated_layers_is_a_clear_error() -> None:
    albert = AlbertForMaskedLM(
        AlbertConfig(vocab_size=64, embedding_size=16, hidden_size=32, num_attention_heads=4, intermediate_size=64)
    )
    with pytest.raises(ModelError, match="no repeated layers"):
        ZeroOrder(albert, offload="cpu")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"offload": "gpu"}, "'cpu', 'disk'"),
        ({"offload": "cpu", "offload_dir": "x"}, "offload='disk'"),
        ({"offload": "auto", "device_memory": "8 cats"}, "as in '8GB'"),
        ({"device_memory": "8GB"}, "no use without offload"),
        ({"device": "cuda"}, "no use without offload"),
        ({"offload": "cpu", "blocks": ("model.layer",)}, "not a module"),
        ({"offload": "disk", "offload_dir": "/proc/nowhere"}, "cannot be written"),
    ],
)
def test_bad_settings_are_clear_errors_and_leave_the_model_alone(settings: dict[str, Any], words: str) -> None:
    model, inputs = make("llama")
    with pytest.raises(ZOError, match=words):
        ZeroOrder(model, **settings)
    with torch.no_grad():
        assert bool(model(**inputs).loss.isfinite())


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_block_file_is_a_clear_error(damage: str, tmp_path: Path) -> None:
    model, inputs = make("llama")
    zo = ZeroOrder(model, offload="disk", offload_dir=str(tmp_path))
    victim = sorted(tmp_path.glob("*.safetensors"))[0]
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:-100])
    with pytest.raises(StateError, match=r"missing or damaged"):
        zo.step(lambda: model(**inputs).loss)


@pytest.mark.parametrize("error", [StateError, KeyboardInterrupt])
@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("tier", ["cpu", "disk"])
def test_a_block_that_could_not_be_fetched_is_fetched_again(
    tier: str, number: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = deep()
    zo = ZeroOrder(model, lr=1e-3, offload=tier)
    assert zo.streaming is not None
    read, calls = zo.streaming.store.read, []

    def failing(*args: Any) -> None:
        calls.append(None)
        if len(calls) == number:
            raise error("cannot be read now")
        read(*args)

    with torch.no_grad():
        wanted = model(**inputs).loss
        monkeypatch.setattr(zo.streaming.store, "read", failing)
        with pytest.raises(error):
            model(**inputs)
        assert torch.equal(model(**inputs).loss, wanted)
        assert torch.equal(model(**inputs).loss, wanted)
    zo.close()
