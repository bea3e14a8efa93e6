"""Law: with PEFT only the adapters move, and what `save_model` writes is the model that was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import adapted, arguments, bare_loop, differing, logged, texts, weights
from models import tiny
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
)
from torch import Tensor, nn

from hf_zo import ZOTrainer
from zo_core import ZOConfig

LM = TaskType.CAUSAL_LM
ADAPTERS: dict[str, PeftConfig] = {
    "lora": LoraConfig(task_type=LM, r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.5),
    "lora with a trained head": LoraConfig(task_type=LM, r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "ia3": IA3Config(task_type=LM, target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prefix tuning": PrefixTuningConfig(task_type=LM, num_virtual_tokens=3),
    "prompt tuning": PromptTuningConfig(task_type=LM, num_virtual_tokens=3),
}


def trained(path: Path, config: PeftConfig, dropout: bool = False, **settings: Any) -> ZOTrainer:
    model, args = adapted(tiny("llama", tied=False), config), arguments(path, learning_rate=1e-3, **settings)
    trainer = ZOTrainer(model, args, train_dataset=texts(), zo_config=ZOConfig(eps=1e-2, dropout=dropout))
    trainer.train()
    return trainer


@pytest.mark.parametrize("config", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_only_adapters_move_and_a_saved_model_computes_the_same_logits(tmp_path: Path, config: PeftConfig) -> None:
    trainer = trained(tmp_path, config)
    trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    before = weights(adapted(tiny("llama", tied=False), config))
    moved = set(differing(before, weights(trainer.model)))
    assert moved
    assert moved <= trainable
    assert trainer.zo.oracle.realisation.whole is False

    trainer.save_model(str(tmp_path / "saved"))
    again = PeftModel.from_pretrained(tiny("llama", tied=False), str(tmp_path / "saved"))
    assert torch.equal(logits(again), logits(trainer.model))
    assert not torch.equal(logits(again), logits(adapted(tiny("llama", tied=False), config)))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=texts()[0]["input_ids"][None]).logits


def test_training_adapters_is_the_bare_loop_on_the_peft_model(tmp_path: Path) -> None:
    config = ADAPTERS["lora"]
    trainer = trained(tmp_path, config, lr_scheduler_type="linear", weight_decay=0.1)
    bare = adapted(tiny("llama", tied=False), config)
    bare_loop(bare, trainer.args, texts(), eps=1e-2)
    assert not differing(weights(trainer.model), weights(bare))


def test_dropout_in_an_adapter_is_off_in_the_probes_unless_asked_for(tmp_path: Path) -> None:
    target = {"task_type": LM, "r": 2, "target_modules": ["q_proj"]}
    without = trained(tmp_path, LoraConfig(**target))
    off = trained(tmp_path, LoraConfig(**target, lora_dropout=0.5))
    on = trained(tmp_path, LoraConfig(**target, lora_dropout=0.5), dropout=True)
    assert logged(off, "projected_grad") == logged(without, "projected_grad") != logged(on, "projected_grad")
    assert not differing(weights(off.model), weights(without.model))


def test_a_run_with_adapters_resumes_bit_for_bit(tmp_path: Path) -> None:
    runs = []
    for resume in (None, str(tmp_path / "out" / "checkpoint-3")):
        args = arguments(tmp_path, learning_rate=1e-3, save_strategy="steps", save_steps=3, num_train_epochs=2)
        model = adapted(tiny("llama", tied=False), ADAPTERS["lora"])
        trainer = ZOTrainer(model, args, train_dataset=texts(), zo_config=ZOConfig(eps=1e-2, rule="momentum"))
        trainer.train(resume_from_checkpoint=resume)
        runs.append(weights(trainer.model))
    assert not differing(*runs)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.parametrize("noise", ["rademacher", "low_rank"])
def test_adapters_that_are_tied_through_a_transposed_view_stay_one(tmp_path: Path, noise: str) -> None:
    config = LoraConfig(task_type=LM, r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
    model, args = adapted(tiny("llama"), config), arguments(tmp_path, learning_rate=1e-2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_embedding_B" in name:
                parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view(parameter.shape))
    trainer = ZOTrainer(model, args, train_dataset=texts(), zo_config=ZOConfig(eps=1e-2, noise=noise))
    trainer.train()
    tied = {name: value for name, value in model.state_dict().items() if "lora_" in name}
    embedded, head = ([v for n, v in tied.items() if part in n] for part in ("lora_embedding_", "lm_head"))
    assert all(torch.equal(a, b.t()) for a, b in zip(embedded, reversed(head), strict=True))
    assert len(trainer.zo.slots) == 2
    trainer.save_model(str(tmp_path / "saved"))
    assert torch.equal(logits(PeftModel.from_pretrained(tiny("llama"), tmp_path / "saved").eval()), logits(model))
