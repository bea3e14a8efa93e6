"""Law: one mixin turns a TRL trainer into a forward-only one; its losses, metrics and token counts stay true."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hf_helpers import CHECKPOINTING, Batch, Weights, arguments, differing, logged, weights
from models import tiny
from peft import LoraConfig, TaskType
from torch import Tensor, nn
from trl import DPOConfig, DPOTrainer, SFTTrainer
from trl_helpers import ROWS, ZOSFTTrainer, sentence, sft

from hf_zo import ZOTrainerMixin
from zo_core import Rademacher, Spsa, ZOConfig, derive_seed


class ZODPOTrainer(ZOTrainerMixin, DPOTrainer):
    pass


class Recording(ZOSFTTrainer):
    """Keeps every batch and loss."""

    calls: list[tuple[Batch, Any, Tensor]]

    def compute_loss(self, model: nn.Module, inputs: Batch, *args: Any, num_items_in_batch: Any = None) -> Tensor:
        before = dict(inputs)
        loss = super().compute_loss(model, inputs, *args, num_items_in_batch=num_items_in_batch)
        self.calls.append((before, num_items_in_batch, loss))
        return loss


def test_supervised_fine_tuning_counts_each_token_once_and_logs_training_as_training(
    tmp_path: Path, tokenizer: Any
) -> None:
    trainer = sft(tmp_path, tokenizer, num_train_epochs=2, gradient_accumulation_steps=2)
    trainer.train()
    tokens = sum(len(row.split()) + 1 for row in ROWS)  # each with an end of sequence
    assert logged(trainer, "num_tokens")[1::2] == [tokens, 2 * tokens]
    *steps, end = trainer.state.log_history
    assert all({"entropy", "mean_token_accuracy", "projected_grad"} <= set(entry) for entry in steps)
    assert not any(key.startswith("eval_") for entry in (*steps, end) for key in entry)
    assert differing(weights(trainer.model), weights(tiny("llama", tied=False)))


def test_evaluation_during_training_is_that_of_the_plain_trainer(tmp_path: Path, tokenizer: Any) -> None:
    trainer = sft(tmp_path, tokenizer, eval_strategy="epoch", bf16=False)
    trainer.train()
    plain = sft(tmp_path, tokenizer, SFTTrainer, bf16=False)
    plain.model.load_state_dict(trainer.model.state_dict())
    wanted = plain.evaluate()
    for key in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert logged(trainer, key) == [wanted[key]]


def perturbed(before: Weights, trainer: Any, seed: int, scale: float) -> Weights:
    """The weights at a probe, written out; tied weights are one slot."""
    names = {id(p): name for name, p in trainer.model.named_parameters(remove_duplicate=False)}
    after = dict(before)
    for slot in trainer.zo.slots:
        z = Rademacher().z(seed, slot.key, 0, slot.tensor.numel(), scale=scale)
        value = before[names[id(slot.tensor)]] + z.view(slot.tensor.shape)
        after |= {name: value for name, p in trainer.model.named_parameters(remove_duplicate=False) if p is slot.tensor}
    return after


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "autocast"])
def test_the_fused_head_computes_with_the_perturbed_weights(
    tmp_path: Path, tokenizer: Any, tied: bool, bf16: bool
) -> None:
    trainer = sft(tmp_path, tokenizer, Recording, tiny("llama", tied=tied), max_steps=1, bf16=bf16)
    before = weights(trainer.model)
    trainer.train()
    assert trainer.zo.oracle.realisation.whole is False
    plain = sft(tmp_path, tokenizer, SFTTrainer, tiny("llama", tied=tied), bf16=bf16)
    points = Spsa().points((derive_seed(42, 0, 0),), 1e-3)
    losses = []
    for (batch, count, loss), point in zip(trainer.calls[1:], points, strict=True):  # the first step looks twice
        plain.model.load_state_dict(perturbed(before, trainer, point.seed, point.scale))
        plain.model.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            wanted = plain.compute_loss(plain.model, dict(batch), num_items_in_batch=count)
        assert torch.equal(loss, wanted)
        assert loss.dtype == torch.float32
        losses.append(float(wanted))
    assert losses[0] != losses[1]
    assert logged(trainer, "projected_grad") == [pytest.approx(abs(losses[0] - losses[1]) / 2e-3, rel=1e-12)]


def test_a_model_in_bfloat16_has_losses_in_float32(tmp_path: Path, tokenizer: Any) -> None:
    model = tiny("llama", tied=False, dtype=torch.bfloat16)
    trainer = sft(tmp_path, tokenizer, Recording, model, bf16=False)
    trainer.train()
    losses = [loss for _, _, loss in trainer.calls]
    assert {loss.dtype for loss in losses} == {torch.float32}
    assert any(loss != loss.bfloat16() for loss in losses)


def test_supervised_fine_tuning_with_lora_moves_only_the_adapter(tmp_path: Path, tokenizer: Any) -> None:
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=2, target_modules=["q_proj", "v_proj"])
    trainer = sft(tmp_path, tokenizer, learning_rate=1e-3, peft_config=config, zo_config=ZOConfig(eps=1e-2), bf16=False)
    before = weights(trainer.model)
    trainer.train()
    moved = differing(before, weights(trainer.model))
    assert moved
    assert all("lora_" in name for name in moved)
    assert trainer.zo.oracle.realisation.whole is False


PAIRS = Dataset.from_dict(
    {
        "prompt": [sentence(index, 3) for index in range(8)],
        "chosen": [" " + sentence(index + 1, 4) for index in range(8)],
        "rejected": [" " + sentence(index + 2, 5) for index in range(8)],
    }
)


def dpo(path: Path, tokenizer: Any, **own: Any) -> Any:
    args = arguments(path, DPOConfig, **{CHECKPOINTING: False}, bf16=False, learning_rate=1e-3)
    model = tiny("llama", tied=False)
    return ZODPOTrainer(model, args=args, train_dataset=PAIRS, processing_class=tokenizer, **own)


def test_preference_optimisation_moves_the_policy_and_not_the_reference(tmp_path: Path, tokenizer: Any) -> None:
    trainer = dpo(tmp_path, tokenizer, ref_model=tiny("llama", tied=False))
    reference = weights(trainer.ref_model)
    trainer.train()
    assert differing(weights(trainer.model), weights(tiny("llama", tied=False)))
    assert not differing(weights(trainer.ref_model), reference)
    assert all(torch.isfinite(torch.tensor(logged(trainer, "projected_grad"))))
    assert len(logged(trainer, "rewards/margins")) == 2


def test_preference_optimisation_with_lora_takes_the_base_as_reference(tmp_path: Path, tokenizer: Any) -> None:
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=2, target_modules=["q_proj", "v_proj"])
    trainer = dpo(tmp_path, tokenizer, peft_config=config, zo_config=ZOConfig(eps=1e-2))
    before = weights(trainer.model)
    trainer.train()
    moved = differing(before, weights(trainer.model))
    assert moved
    assert all("lora_" in name for name in moved)
    assert any(logged(trainer, "projected_grad"))


def test_probes_that_cannot_be_stacked_leave_the_metrics_alone(tmp_path: Path, tokenizer: Any) -> None:
    logs = []
    for stack in (True, False):
        config = ZOConfig(noise="low_rank", num_probes=2, stack_probes=stack)
        trainer = sft(tmp_path / str(stack), tokenizer, zo_config=config, bf16=False)
        trainer.train()
        logs.append(trainer.state.log_history[:-1])
    assert logs[0] == logs[1]
