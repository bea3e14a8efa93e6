"""Law: `ZOTrainer` with a streamed model does what it does with a resident one, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate.optimizer
import pytest
import torch
from hf_helpers import arguments, differing, texts, weights
from models import tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

from hf_zo import ZOTrainer, ZOTrainingArguments

TIERS = ("cpu", "disk")


def trainer(path: Path, tier: str | None, **changes: Any) -> ZOTrainer:
    torch.manual_seed(0)
    where = {"zo_offload_dir": str(path / "blocks")} if tier == "disk" else {}
    settings = {"learning_rate": 1e-3, "zo_rule": "momentum", "zo_offload": tier, **where, **changes}
    rows = texts(24)
    return ZOTrainer(
        model=tiny("llama"),
        args=arguments(path, ZOTrainingArguments, **settings),
        train_dataset=rows,
        eval_dataset=rows[:8],
    )


@pytest.mark.parametrize("tier", TIERS)
def test_training_evaluating_and_predicting_are_those_of_a_resident_model(tier: str, tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 2, "gradient_accumulation_steps": 2, "weight_decay": 0.1}
    runs = [trainer(tmp_path / str(where), where, **settings) for where in (None, tier)]
    for run in runs:
        run.train()
    resident, streamed = runs
    timed = ("runtime", "per_second", "preparation_time")
    histories = [
        [{k: v for k, v in entry.items() if not any(word in k for word in timed)} for entry in run.state.log_history]
        for run in runs
    ]
    assert histories[0] == histories[1]
    assert differing(weights(resident.model), weights(streamed.model)) == []
    a, b = (run.predict(run.eval_dataset).predictions for run in runs)
    assert (a == b).all()


@pytest.mark.parametrize("tier", TIERS)
def test_a_resumed_run_continues_bit_for_bit(tier: str, tmp_path: Path) -> None:
    straight = trainer(tmp_path / "straight", tier, save_strategy="steps", save_steps=3)
    straight.train()
    again = trainer(tmp_path / "again", tier)
    again.train(resume_from_checkpoint=str(tmp_path / "straight" / "out" / "checkpoint-3"))
    assert differing(weights(straight.model), weights(again.model)) == []


@pytest.mark.parametrize("tier", TIERS)
def test_a_saved_model_loads_as_it_was_trained(tier: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, tier)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert differing(weights(run.model), weights(loaded)) == []


def test_no_probe_sees_the_modes_of_another(tmp_path: Path) -> None:
    """The first probe ends, and sets the modes back, before the others come to the dropout in front of the head."""
    runs = []
    for tier in (None, "cpu"):
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
        model = BertForSequenceClassification(BertConfig(vocab_size=64, hidden_dropout_prob=0.5, **shape))
        rows = [{"input_ids": row["input_ids"], "labels": index % 2} for index, row in enumerate(texts())]
        args = arguments(tmp_path / str(tier), ZOTrainingArguments, learning_rate=1e-3, zo_offload=tier)
        runs.append(ZOTrainer(model=model, args=args, train_dataset=rows))
        runs[-1].train()
    assert differing(*(weights(run.model) for run in runs)) == []
    grads = [[entry.get("projected_grad") for entry in run.state.log_history] for run in runs]
    assert grads[0] == grads[1]


@pytest.mark.parametrize("tier", TIERS)
def test_micro_batches_of_a_step_share_a_sweep(tier: str, tmp_path: Path) -> None:
    runs = [
        trainer(tmp_path / str(where), where, gradient_accumulation_steps=4, zo_num_probes=2) for where in (None, tier)
    ]
    for run in runs:
        run.train()
    assert differing(*(weights(run.model) for run in runs)) == []
    losses = [[entry.get("loss") for entry in run.state.log_history] for run in runs]
    assert losses[0] == losses[1]
    streaming, steps = runs[1].zo.streaming, runs[1].state.global_step
    size = sum(block.nbytes for block in streaming.blocks)
    assert steps == 2  # six micro-batches: one step of four, one of two
    assert streaming.bytes_read <= (steps + 2) * size  # to fetch each block once a step, flush, and print


def test_losses_that_draw_random_numbers_have_a_sweep_each(tmp_path: Path) -> None:
    class Noisy(ZOTrainer):
        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            inputs["input_ids"] = (inputs["input_ids"] + torch.randint(0, 2, inputs["input_ids"].shape)) % 60
            return super().compute_loss(model, inputs, *args, **kwargs)

    results = []
    for tier in (None, "cpu"):
        settings = {"zo_offload": tier, "learning_rate": 1e-3, "gradient_accumulation_steps": 2}
        args = arguments(tmp_path / str(tier), ZOTrainingArguments, **settings)
        run = Noisy(model=tiny("llama"), args=args, train_dataset=texts())
        run.train()
        results.append(weights(run.model))
    assert differing(*results) == []


@pytest.mark.parametrize("accumulation", [1, 4])
def test_what_a_trainer_counts_in_its_loss_counts_once(accumulation: int, tmp_path: Path) -> None:
    class Counting(ZOTrainer):
        before, after = 0, 0

        def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.before += 1
            result = super().compute_loss(model, *args, **kwargs)
            self.after += 1
            return result

    settings = {"zo_offload": "cpu", "zo_num_probes": 2, "gradient_accumulation_steps": accumulation}
    args = arguments(tmp_path, ZOTrainingArguments, **settings)
    run = Counting(model=tiny("llama"), args=args, train_dataset=texts())
    run.before = run.after = 0
    run.train()
    assert (run.before, run.after) == (4, 4)


@pytest.mark.parametrize("tier", TIERS)
def test_preparing_a_run_moves_no_momentum(tier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate moves an optimizer's state to its device, where that of a streamed model has no room."""
    moved: list[int] = []

    def move(state: Any, device: torch.device) -> Any:
        tensors = [value for kept in state["state"].values() for value in kept.values() if isinstance(value, Tensor)]
        moved.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
        return state

    monkeypatch.setattr(accelerate.optimizer, "move_to_device", move)
    run = trainer(tmp_path, tier)
    run.train()
    assert sum(moved) == 0
    momentum = [kept["momentum"] for kept in run.zo.optimizer.state_dict()["state"].values()]
    assert sum(tensor.numel() for tensor in momentum) == sum(p.numel() for p in run.model.parameters())


def test_the_state_of_a_torch_optimizer_is_still_placed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(accelerate.optimizer, "move_to_device", lambda state, device: asked.append(state) or state)
    run = trainer(tmp_path, None, zo_rule="auto", optim="sgd", max_steps=1)
    run.train()
    assert len(asked) == 1
