"""Sharing a fine-tune as its seed log: saved from a trainer, loaded on the base model, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hf_helpers import adapted, differing, seedlog_trainer, texts, weights
from models import tiny
from peft import LoraConfig
from torch import nn

from hf_zo import load_zo_adapter, save_zo_adapter
from zo_core import LowRank, SeedLog, StateError, ZOConfig

LOG = "seedlog.zo"


def test_a_shared_fine_tune_is_loaded_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = seedlog_trainer(tmp_path)
    trainer.train()
    folder = save_zo_adapter(trainer, tmp_path / "shared")
    assert {path.name for path in folder.iterdir()} == {LOG, "zo_adapter.json", "README.md"}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 5_000
    assert differing(weights(load_zo_adapter(tiny("llama"), folder)), weights(trainer.model)) == []

    def download(repo_id: str, **kwargs: Any) -> str:
        assert repo_id == "someone/tune"
        assert kwargs == {"revision": "v1", "allow_patterns": ["zo_adapter.json", LOG, "README.md"]}
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    loaded = load_zo_adapter(tiny("llama"), "someone/tune", revision="v1")
    assert differing(weights(loaded), weights(trainer.model)) == []
    start = load_zo_adapter(tiny("llama"), folder, until=0)
    assert differing(weights(start), weights(tiny("llama"))) == []


@pytest.mark.parametrize("refresh", [3, None])
@pytest.mark.parametrize("end", ["pending", "closed", "best"])
def test_low_rank_updates_are_shared_whether_or_not_they_are_pending(
    end: str, refresh: int | None, tmp_path: Path
) -> None:
    best = {
        "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True,
        "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "eval_dataset": texts(4),
    }  # fmt: skip
    config = ZOConfig(noise=LowRank(refresh=refresh))
    trainer = seedlog_trainer(tmp_path, zo_config=config, **(best if end == "best" else {}))
    trainer.train()
    if end == "best":
        assert trainer.state.best_global_step < trainer.state.global_step
    if end == "closed":
        trainer.zo.close()
    folder = save_zo_adapter(trainer, tmp_path / "shared")
    assert differing(weights(load_zo_adapter(tiny("llama"), folder)), weights(trainer.model)) == []


def test_adapters_are_shared_with_the_same_start(tmp_path: Path) -> None:
    def model() -> nn.Module:
        return adapted(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"]))

    trainer = seedlog_trainer(tmp_path, model=model())
    trainer.train()
    save_zo_adapter(tmp_path / "out" / LOG, tmp_path / "shared")
    assert differing(weights(load_zo_adapter(model(), tmp_path / "shared")), weights(trainer.model)) == []


def test_the_model_card_says_what_it_is(tmp_path: Path) -> None:
    trainer = seedlog_trainer(tmp_path)
    trainer.model.config._name_or_path = "someone/base"
    trainer.train()
    text = (save_zo_adapter(trainer, tmp_path / "shared") / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: zo-trainer\n")
    assert "base_model: someone/base" in text
    assert SeedLog.read(tmp_path / "out" / LOG).header["base"]["digest"] in text


def test_a_damaged_folder_is_a_clear_error(tmp_path: Path) -> None:
    trainer = seedlog_trainer(tmp_path)
    trainer.train()
    folder = save_zo_adapter(trainer, tmp_path / "shared")
    before = weights(tiny("llama"))

    def refuses(words: str, model: nn.Module | None = None) -> None:
        model = tiny("llama") if model is None else model
        untouched = weights(model)
        with pytest.raises(StateError, match=words):
            load_zo_adapter(model, folder)
        assert differing(weights(model), untouched) == []

    other = tiny("llama", tied=False)
    refuses("another frozen base than this model has: 0 tensors .* in the log, 1 tensors", other)
    data = (folder / LOG).read_bytes()
    (folder / LOG).write_bytes(data[:-24])
    refuses("is cut off: it ends at step 7, and zo_adapter.json says it was shared with 8")
    (folder / LOG).write_bytes(data[:-30] + b"x" + data[-29:])
    refuses("is corrupt at byte")
    (folder / LOG).write_bytes(data)
    config = json.loads((folder / "zo_adapter.json").read_text())
    (folder / "zo_adapter.json").write_text(json.dumps({**config, "trained_weights": "0" * 32}))
    with pytest.raises(StateError, match="the replayed weights are not those that were shared"):
        load_zo_adapter(tiny("llama"), folder)
    (folder / "zo_adapter.json").unlink()
    refuses("is no folder of a shared seed log")
    assert differing(before, weights(tiny("llama"))) == []
