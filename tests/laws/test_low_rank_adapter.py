"""Law: a run in one window is a LoRA adapter, which PEFT loads on the base model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import batch, closure, gpt2, only_linear, tiny
from peft import PeftModel

from zo_core import LowRank, StateError, ZeroOrder, save_adapter
from zo_core.following import begin_again
from zo_core.records import Rollback

FOREVER = LowRank(refresh=None)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("num_probes", [1, 2])
def test_the_adapter_on_the_base_is_the_trained_model(name: str, num_probes: int, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = only_linear(gpt2()[0].float() if name == "gpt2" else tiny(name, tied=False))
    base = {key: value.clone() for key, value in model.state_dict().items()}
    inputs = batch("llama")
    zo = ZeroOrder(model, noise=FOREVER, lr=1e-3, num_probes=num_probes, rule="momentum")
    for _ in range(60):
        zo.step(lambda: model(**inputs).loss)
    with zo.hidden():  # the base was only read
        assert all(torch.equal(value, base[key]) for key, value in model.named_parameters())
    with torch.no_grad():
        trained = model(**inputs).logits
        save_adapter(zo, tmp_path / "adapter")
        zo.close()
        model.load_state_dict(base)
        before = model(**inputs).logits
        adapted = PeftModel.from_pretrained(model, tmp_path / "adapter")(**inputs).logits
    assert torch.allclose(adapted, trained, atol=1e-5)
    assert (before - trained).abs().max() > 1e-3


def rolled_back(zo: ZeroOrder) -> None:
    zo.repeat((), 1.0, rollback=Rollback(1, 0.5))
    zo.apply()


def unfrozen(zo: ZeroOrder) -> None:
    zo.model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)


@pytest.mark.parametrize("merge", [rolled_back, begin_again, unfrozen, ZeroOrder.close])
def test_a_run_whose_base_was_written_is_no_adapter(merge: Callable[[ZeroOrder], object], tmp_path: Path) -> None:
    """Not even with steps after that, in a checkpoint, or on an engine that continues from it."""

    def step(zo: ZeroOrder) -> None:
        zo.step(closure("llama", zo.model))

    def refuses(zo: ZeroOrder) -> None:
        with pytest.raises(StateError, match="some of its updates are in the base weights"):
            save_adapter(zo, tmp_path / "adapter")

    zo, other = (ZeroOrder(only_linear(tiny("llama", tied=False)), noise=FOREVER, lr=1e-3) for _ in range(2))
    for _ in range(3):
        step(zo)
    start = zo.state_dict()
    if merge is rolled_back:
        kept = zo.snapshot()
        merge(zo)
        refuses(zo)
        kept.restore()
    save_adapter(zo, tmp_path / "before")
    merge(zo)
    step(zo)
    refuses(zo)
    if merge is not unfrozen:
        other.load_state_dict(zo.state_dict())
        refuses(other)
        other.load_state_dict(start)
        save_adapter(other, tmp_path / "again")
    assert not (tmp_path / "adapter").exists()


def test_runs_that_are_no_adapter_are_refused_with_everything_that_is_wrong(tmp_path: Path) -> None:
    model = tiny("llama")
    for noise, words in ((FOREVER, "norm.weight is not the weight of one linear"), (LowRank(), r"refresh=None")):
        zo = ZeroOrder(model, noise=noise, lr=1e-3)
        zo.step(closure("llama", model))
        with pytest.raises(StateError, match=words):
            save_adapter(zo, tmp_path)
    assert not list(tmp_path.iterdir())
    other = only_linear(tiny("llama", tied=False))
    with pytest.raises(StateError, match="nothing was learnt yet"):
        save_adapter(ZeroOrder(other, noise=FOREVER), tmp_path)
    decayed = ZeroOrder(other, noise=FOREVER, lr=1e-3, weight_decay=0.1)
    decayed.step(closure("llama", other))
    with pytest.raises(StateError, match="weight decay"):
        save_adapter(decayed, tmp_path)
    with pytest.raises(StateError, match="write into the base"):
        save_adapter(ZeroOrder(other, noise=FOREVER, rule="sign"), tmp_path)
