"""Law: `ZOTrainer` trains what transformers has quantised with bitsandbytes, and checkpoints give back its scales."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hf_helpers import adapted, arguments, differing, saved_llama, texts, weights
from int4_hf_helpers import load, made, trained
from int4_models import layers, scales
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from hf_zo import ZOTrainer, ZOTrainingArguments
from zo_core import ConfigError, Int4Scales, ModelError, ZeroOrder, ZOConfig

FLAG = "_hf_peft_config_loaded"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model on disk, as a user has one."""
    return saved_llama(tmp_path_factory.mktemp("float"))


@pytest.mark.parametrize("nested", [True, False])
def test_saved_and_loaded_models_have_the_same_scales(tmp_path: Path, folder: Path, nested: bool) -> None:
    model = load(folder, nested)
    start = weights(model)
    trainer = trained(tmp_path, model)
    assert FLAG not in vars(model)
    end = weights(model)
    changed = {name for name in end if "quant_state" not in name and not torch.equal(end[name], start[name])}
    assert changed == {name for name in start if name.endswith(".absmax")}
    trainer.save_model(str(tmp_path / "trained"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert differing(weights(model), weights(again)) == []
    assert len(layers(again)) == len(layers(model)) == 14


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_it_equals_a_bare_loop(tmp_path: Path, folder: Path, offload: str | None) -> None:
    model, other = load(folder), load(folder)
    batches: list[Any] = []

    class Seen(ZOTrainer):
        def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            batches.append({**inputs, "num_items_in_batch": num_items_in_batch})
            return super().training_step(model, inputs, num_items_in_batch)

    trainer = trained(tmp_path, model, cls=Seen, zo_config=ZOConfig(offload=offload, seed=5))
    zo = ZeroOrder(other, lr=1e-2, seed=5)
    for batch in batches:
        zo.step(lambda batch=batch: other(**batch).loss)
    assert differing(weights(model), weights(other)) == []
    assert trainer.zo.clip == 100.0
    trainer.zo.close()


@pytest.mark.parametrize("nested", [True, False])
def test_a_resumed_run_ends_where_the_whole_run_ends(tmp_path: Path, folder: Path, nested: bool) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole, resumed = load(folder, nested), load(folder, nested)
    trained(tmp_path, whole, **saving)
    trainer = made(tmp_path, resumed, **saving)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert differing(weights(whole), weights(resumed)) == []


def test_the_best_model_is_loaded_with_its_scales(tmp_path: Path, folder: Path) -> None:
    model = load(folder)
    seen: dict[int, list[torch.Tensor]] = {}

    class Watched(ZOTrainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> Any:
            seen[self.state.global_step] = scales(self.model)
            metrics = super().evaluate(*args, **kwargs)
            metrics["eval_loss"] = abs(self.state.global_step - 2.0)  # the best is the one in the middle
            self.state.log_history[-1]["eval_loss"] = metrics["eval_loss"]
            return metrics

    steps = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trained(tmp_path, model, cls=Watched, eval_dataset=texts(4), load_best_model_at_end=True, **steps)
    assert all(torch.equal(a, b) for a, b in zip(scales(model), seen[2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(scales(model), seen[4], strict=True))


def test_dequantised_models_have_the_trained_scales(tmp_path: Path, folder: Path) -> None:
    model = load(folder)
    trained(tmp_path, model)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        exported = copy.deepcopy(model).dequantize(dtype=torch.float32)
        assert layers(exported) == []
        torch.testing.assert_close(exported(input_ids=ids).logits, expected)
        exported.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.bfloat16)
    assert differing(weights(exported), weights(again)) == []
    assert layers(again) == []


# QLoRA


def qlora(folder: Path) -> Any:
    return adapted(load(folder), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="gaussian"))


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_with_adapters_the_scales_stay(tmp_path: Path, folder: Path, offload: str | None) -> None:
    """Also where bitsandbytes would repack codes in eval mode, which is what the probes run in."""
    model = qlora(folder)
    for layer in layers(model):
        layer.support_avx512bf16_for_cpu = True
    start = weights(model)
    trained(tmp_path, model, zo_config=ZOConfig(offload=offload)).zo.close()
    assert all("lora_" in name for name in differing(start, weights(model)))
    assert differing(start, weights(model))
    assert layers(model)[0].weight.quant_state.nested  # not even made ready


def test_scales_move_beside_adapters_when_asked(tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = qlora(folder)
    adapters = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    Int4Scales().slots(model)
    before = scales(model)
    target = Int4Scales(others=True, others_lr=1e-4, others_eps=1e-2)
    trainer = trained(tmp_path, model, zo_config=ZOConfig(target=target))
    assert all(not torch.equal(p, adapters[name]) for name, p in model.named_parameters() if name in adapters)
    assert all(not torch.equal(a, b) for a, b in zip(scales(model), before, strict=True))
    assert {(group["lr"], group["eps"]) for group in trainer.optimizer.param_groups} == {(1e-2, 1e-2), (1e-4, 1e-2)}
    assert trainer.zo.eps == 1e-2  # of the scales
    assert any("adapters only" in record.getMessage() for record in caplog.records)


# The refusal


def test_8bit_models_are_refused_with_the_reason(tmp_path: Path, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    with pytest.raises(ModelError, match="8-bit layers round their inputs"):
        made(tmp_path, model)
    assert FLAG not in vars(model)


def test_a_quantised_model_is_still_refused_where_scales_do_not_move(tmp_path: Path, folder: Path) -> None:
    model = load(folder)
    with pytest.raises(ValueError, match="purely quantized"):
        made(tmp_path, model, zo_config=ZOConfig(target="trainable"))
    assert FLAG not in vars(model)
    args = arguments(tmp_path, ZOTrainingArguments, zo_target="trainable")
    with pytest.raises(ValueError, match="purely quantized"):
        ZOTrainer(model, args, train_dataset=texts())


def test_settings_that_cannot_work_are_reported_as_ever(tmp_path: Path, folder: Path) -> None:
    args = arguments(tmp_path, ZOTrainingArguments, zo_target="int5_scales")
    with pytest.raises(ConfigError, match="target='int5_scales' is not known"):
        ZOTrainer(model=LlamaForCausalLM.from_pretrained(folder), args=args, train_dataset=texts())


def test_learning_rates_of_scales_are_not_judged_as_those_of_weights(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def said(**settings: Any) -> list[str]:
        caplog.clear()
        made(tmp_path, load(folder), **settings).train()
        return [r.getMessage() for r in caplog.records if "learning_rate" in r.getMessage()]

    assert said(learning_rate=0.5) == []
    assert said(learning_rate=1e-6, zo_config=ZOConfig(target=Int4Scales(relative=False))) == []
    (message,) = said(learning_rate=1e-6)
    assert message.startswith("learning_rate=1e-06 is far below the rates that work for 896 scales")
    assert "write one of 3e-04 to 2e+00" in message


def test_with_auto_the_rate_of_the_arguments_is_not_mentioned(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = SimpleNamespace(lr=1e-2, summary=lambda: "the rate that was found")
    monkeypatch.setattr(ZeroOrder, "suggest_lr", lambda *args, **settings: found)
    made(tmp_path, load(folder), learning_rate=1e-6, zo_config=ZOConfig(lr="auto")).train()
    (message,) = [r.getMessage() for r in caplog.records if "rate" in r.getMessage()]
    assert message.startswith("the rate that was found")
