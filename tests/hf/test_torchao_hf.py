"""Law: `ZOTrainer` trains what transformers has quantised with torchao, and checkpoints give back its scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import arguments, saved_llama, texts
from torch import Tensor, nn
from torchao_models import GROUPS, plain
from traces import same_bits
from transformers import AutoModelForCausalLM, TorchAoConfig

from hf_zo import ZOTrainer
from zo_core import ZeroOrder, ZOConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_llama(tmp_path_factory.mktemp("float"))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=TorchAoConfig(GROUPS), dtype=dtype)


def trainer(path: Path, model: nn.Module, **settings: Any) -> Any:
    own = {name: settings.pop(name) for name in ("zo_config", "eval_dataset") if name in settings}
    own = {"zo_config": ZOConfig(eps=1e-2), **own}
    args = arguments(path, **{"learning_rate": 1e-2, **settings})
    return ZOTrainer(model=model, args=args, train_dataset=texts(), **own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_trained_models_are_saved_and_loaded(tmp_path: Path, folder: Path, dtype: torch.dtype) -> None:
    model = load(folder, dtype)
    before = plain(model)
    run = trainer(tmp_path, model)
    run.train()
    after = plain(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.endswith(".scale")}
    run.save_model(str(tmp_path / "trained"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained", dtype=dtype)
    assert same_bits(plain(again), after)


def test_the_best_model_is_loaded_with_its_scales(tmp_path: Path, folder: Path) -> None:
    model = load(folder)
    seen: dict[int, dict[str, Tensor]] = {}

    class Watched(ZOTrainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> Any:
            seen[self.state.global_step] = plain(self.model)
            metrics = super().evaluate(*args, **kwargs)
            metrics["eval_loss"] = abs(self.state.global_step - 2.0)  # the best is the one in the middle
            self.state.log_history[-1]["eval_loss"] = metrics["eval_loss"]
            return metrics

    steps = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    args = arguments(tmp_path, learning_rate=1e-2, load_best_model_at_end=True, **steps)
    Watched(model=model, args=args, train_dataset=texts(), eval_dataset=texts(4)).train()
    assert same_bits(plain(model), seen[2])
    assert not same_bits(plain(model), seen[4])


def test_a_trainer_equals_a_bare_loop(tmp_path: Path, folder: Path) -> None:
    model, other = load(folder), load(folder)
    batches: list[Any] = []

    class Seen(ZOTrainer):
        def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
            batches.append({**inputs, "num_items_in_batch": num_items_in_batch})
            return super().training_step(model, inputs, num_items_in_batch)

    args = arguments(tmp_path, learning_rate=1e-2)
    Seen(model=model, args=args, train_dataset=texts(), zo_config=ZOConfig(seed=5)).train()
    zo = ZeroOrder(other, lr=1e-2, seed=5)
    for batch in batches:
        zo.step(lambda batch=batch: other(**batch).loss)
    assert same_bits(plain(model), plain(other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_trainer_ends_where_the_whole_run_ends(tmp_path: Path, folder: Path, dtype: torch.dtype) -> None:
    """Its checkpoints have the weights in parts, which transformers itself would not find again."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole, resumed = load(folder, dtype), load(folder, dtype)
    trainer(tmp_path, whole, **saving).train()
    trainer(tmp_path, resumed, **saving, zo_config=ZOConfig(eps=1e-2)).train(
        resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2")
    )
    assert same_bits(plain(whole), plain(resumed))
