"""Law: under a trainer, one forward for all probes logs and learns what separate ones do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_helpers import adapted, arguments, differing, logged, texts, weights
from models import tiny
from peft import LoraConfig
from torch import Tensor, nn

from hf_zo import ZOTrainer, ZOTrainingArguments
from zo_core import ConfigError, LowRank, ZOConfig

U = 2.0**-24


def own_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits = outputs["logits"][:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"label_smoothing_factor": 0.1},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "own loss": {"compute_loss_func": own_loss},
    "encoder-decoder": {"model": "t5"},
    "bf16": {"bf16": True},
}


def trainer_on(path: Path, stack: bool, model: str | nn.Module = "llama", **settings: Any) -> Any:
    model = tiny(model, dtype=torch.float64) if isinstance(model, str) else copy.deepcopy(model)
    config = ZOConfig(noise=LowRank(refresh=3), num_probes=2, eps=1e-2, stack_probes=stack)
    own = {"compute_loss_func": settings.pop("compute_loss_func", None), "zo_config": config}
    return ZOTrainer(model, arguments(path, **{"learning_rate": 1e-4, **settings}), train_dataset=texts(), **own)


def trained(*args: Any, **settings: Any) -> Any:
    trainer = trainer_on(*args, **settings)
    trainer.train()
    return trainer


@pytest.mark.parametrize("case", CASES)
def test_a_trainer_logs_what_it_does_with_separate_probes(case: str, tmp_path: Path) -> None:
    trainers = [trained(tmp_path / str(stack), stack, **CASES[case]) for stack in (True, False)]
    assert trainers[0].zo.oracle.stacking
    assert trainers[0].zo.oracle._compared
    losses = [logged(trainer, "loss") for trainer in trainers]
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-2 if case == "bf16" else 16 * U)
    if case != "bf16":
        grads = [logged(trainer, "projected_grad") for trainer in trainers]
        assert grads[0] == pytest.approx(grads[1], rel=1e-3)


def test_adapters_train_with_their_base_read_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = adapted(tiny("llama", dtype=torch.float64), config)
    before = weights(model)
    trainers = [trained(tmp_path / str(stack), stack, model=model) for stack in (True, False)]
    assert trainers[0].zo.oracle.stacking
    assert logged(trainers[0], "loss") == pytest.approx(logged(trainers[1], "loss"), rel=16 * U)
    moved = differing(weights(trainers[0].model), before)
    assert moved
    assert all("lora_" in name for name in moved)


def test_a_resumed_run_continues_bit_for_bit(tmp_path: Path) -> None:
    whole = trained(tmp_path / "a", True)
    settings = {"save_strategy": "steps", "save_steps": 2}
    trained(tmp_path / "b", True, **settings)
    again = trainer_on(tmp_path / "b", True, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "b" / "out" / "checkpoint-2"))
    assert logged(again, "loss") == logged(whole, "loss")
    assert differing(weights(again.model), weights(whole.model)) == []


def test_the_setting_is_an_argument(tmp_path: Path) -> None:
    args = ZOTrainingArguments(output_dir=str(tmp_path), use_cpu=True, zo_noise="low_rank", zo_stack_probes=True)
    assert args.to_zo_config() == ZOConfig(noise="low_rank", stack_probes=True)
    args.zo_noise = "rademacher"
    with pytest.raises(ConfigError, match="zo_stack_probes=True needs zo_noise='low_rank'"):
        ZOTrainer(model=tiny("llama"), args=args)
