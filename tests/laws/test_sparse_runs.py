"""Law: a run with masks is the same wherever its weights are, after a resume, and in a replay."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import arguments, differing, texts
from hf_helpers import weights as values_of
from models import tiny
from offload_helpers import places, scheduled
from sparse_helpers import ALL, engine, run
from traces import same_bits, weights
from transformers import AutoModelForCausalLM

from hf_zo import ZOTrainer, from_pretrained_offloaded
from zo_core import (
    SeedLog,
    SeedLogWriter,
    Sparse,
    StateError,
    ZOConfig,
    replay,
)


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.float32, {"rule": "momentum", "weight_decay": 0.1}),
        (torch.bfloat16, {"rule": "sgd", "num_probes": 4, "weight_decay": 0.1}),
        (torch.bfloat16, {"rule": "momentum", "estimator": "fzoo", "num_probes": 4}),
    ],
    ids=["float32", "bfloat16", "fzoo"],
)
def test_resident_and_streamed_are_one(dtype: torch.dtype, settings: dict[str, Any], tmp_path: Path) -> None:
    found: list[Any] = []
    for place in places(tmp_path):
        model = tiny("llama", dtype=dtype)
        zo = engine(model, Sparse(0.4, "gaussian"), **settings, **place)
        losses = scheduled(zo, 4)
        found.append((losses, dict(sorted(zo.optimizer.thresholds.items())), weights(model)))
    for losses, thresholds, final in found[1:]:
        assert losses == found[0][0]
        assert thresholds == found[0][1]
        assert same_bits(final, found[0][2])


def test_a_checkpoint_that_is_trained_where_it_lies_has_the_same_thresholds(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "model")
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
              from_pretrained_offloaded(AutoModelForCausalLM, tmp_path / "model")]  # fmt: skip
    found = []
    for model in models:
        zo = engine(model, **ALL)
        run(zo, 4)
        zo.close()
        found.append((dict(sorted(zo.optimizer.thresholds.items())), weights(model)))
    assert found[0][0] == found[1][0]
    assert same_bits(found[0][1], found[1][1])


@pytest.mark.parametrize("tier", [None, "disk"])
def test_a_resumed_run_has_the_thresholds_of_the_start(tier: str | None) -> None:
    place = {} if tier is None else {"offload": tier}
    straight = engine(tiny("llama"), lr=0.1, **ALL, **place)
    run(straight, 4)
    file = io.BytesIO()
    torch.save({"model": straight.model.state_dict(), "zo": straight.state_dict()}, file)
    file.seek(0)
    kept = torch.load(file, weights_only=True)
    again = engine(tiny("llama"), lr=0.1, **ALL, **place)
    again.model.load_state_dict(kept["model"])
    again.load_state_dict(kept["zo"])
    for zo in (straight, again):
        run(zo, 4)
    assert again.optimizer.thresholds == straight.optimizer.thresholds
    assert same_bits(weights(straight.model), weights(again.model))
    del kept["zo"]["optimizer"]["zo"]["thresholds"]  # other ones would show
    wrong = engine(tiny("llama"), lr=0.1, **ALL, **place)
    wrong.model.load_state_dict(kept["model"])
    wrong.load_state_dict(kept["zo"])
    run(wrong, 4)
    assert not same_bits(weights(straight.model), weights(wrong.model))


def test_a_damaged_checkpoint_is_an_error_before_anything_is_loaded() -> None:
    zo = engine(tiny("mlp"))
    run(zo, 1, "mlp")
    state = zo.state_dict()
    for wrong in ([1.0], {"inner.0.weight": "0.1"}):
        state["optimizer"]["zo"]["thresholds"] = wrong
        with pytest.raises(StateError, match="thresholds"):
            zo.load_state_dict(state)
    assert zo.step_count == 1


@pytest.mark.parametrize("tier", [None, "cpu"])
def test_under_the_trainer_a_resumed_run_continues_bit_for_bit(tier: str | None, tmp_path: Path) -> None:
    def trainer(path: Path, **changes: Any) -> ZOTrainer:
        args = arguments(path, num_train_epochs=2, **changes)
        config = ZOConfig(noise="sparse", lr=1e-2, rule="momentum", offload=tier)
        return ZOTrainer(model=tiny("llama"), args=args, train_dataset=texts(12), zo_config=config)

    straight = trainer(tmp_path / "a", save_strategy="steps", save_steps=2)
    straight.train()
    again = trainer(tmp_path / "b")
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "out" / "checkpoint-2"))
    assert differing(values_of(straight.model), values_of(again.model)) == []


@pytest.mark.parametrize("tier", [None, "cpu"])
def test_replay_is_exact_and_goes_on_from_a_checkpoint(tier: str | None, tmp_path: Path) -> None:
    place = {} if tier is None else {"offload": tier}
    zo = engine(tiny("llama"), Sparse(0.3, "gaussian"), lr=0.05, **ALL, **place)
    log = SeedLogWriter.attach(zo, tmp_path / "log")
    run(zo, 3)
    middle = copy.deepcopy({"model": zo.model.state_dict(), "zo": zo.state_dict()})
    run(zo, 3)
    log.close()
    final = weights(zo.model)
    assert SeedLog.read(tmp_path / "log").header["noise"] == {"name": "sparse", "quantile": 0.3, "of": "gaussian"}
    model = tiny("llama")
    assert replay(model, tmp_path / "log") == 6
    assert same_bits(weights(model), final)
    onward = engine(tiny("llama"), Sparse(0.3, "gaussian"), lr=0.05, **ALL)
    onward.model.load_state_dict(middle["model"])
    onward.load_state_dict(middle["zo"])
    assert replay(onward, tmp_path / "log") == 6
    assert same_bits(weights(onward.model), final)
    used = engine(tiny("llama"), Sparse(0.3, "gaussian"), lr=0.05, **ALL)
    used.optimizer.thresholds["norm.weight"] = used.optimizer.thresholds["lm_head.weight"] = 0.5
    replay(used, tmp_path / "log")  # thresholds of other weights do not count
    assert same_bits(weights(used.model), final)


def test_a_log_that_begins_in_mid_run_says_that_it_cannot_be_replayed(tmp_path: Path) -> None:
    zo = engine(tiny("mlp"))
    run(zo, 2, "mlp")
    start = weights(zo.model)
    log = SeedLogWriter.attach(zo, tmp_path / "log")
    run(zo, 1, "mlp")
    log.close()
    model = tiny("mlp")
    model.load_state_dict(start)
    with pytest.raises(StateError, match=r"thresholds .* before this log"):
        replay(model, tmp_path / "log")
