"""Law: with an objective, `ZOTrainer` maximises what a function of the outputs, or ``compute_metrics``, returns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import arguments, differing, logged, texts, weights, zo_trainer
from models import tiny

from hf_zo import ZOTrainer, ZOTrainingArguments
from zo_core import ConfigError, LossError, ZeroOrder


def accuracy(outputs: Any, inputs: Any) -> torch.Tensor:
    """The share of tokens that are predicted."""
    right = outputs.logits[:, :-1].argmax(-1) == inputs["labels"][:, 1:]
    return right[inputs["labels"][:, 1:] != -100].float().mean()


def metrics(found: Any) -> dict[str, float]:
    outputs = type("Outputs", (), {"logits": torch.from_numpy(found.predictions)})
    return {"accuracy": accuracy(outputs, {"labels": torch.from_numpy(found.label_ids)}).item(), "other": 7.0}


def run(path: Path, objective: Any, **own: Any) -> ZOTrainer:
    given = {name: own.pop(name) for name in ("compute_metrics", "compute_loss_func", "eval_dataset") if name in own}
    settings = {"zo_estimator": "es", "zo_num_probes": 6, "zo_eps": 0.05, "learning_rate": 0.02, **own}
    args = arguments(path, ZOTrainingArguments, **settings)
    trainer = ZOTrainer(tiny("llama"), args, train_dataset=texts(), objective=objective, **given)
    trainer.train()
    return trainer


def test_a_function_of_the_outputs_is_maximised(tmp_path: Path) -> None:
    seen: list[Any] = []

    def spied(outputs: Any, inputs: Any) -> Any:
        seen.append((inputs, accuracy(outputs, inputs)))
        return seen[-1][1]

    trainer = run(tmp_path, spied)
    model = tiny("llama")
    zo = ZeroOrder(model, estimator="es", num_probes=6, eps=0.05, lr=0.02, maximize=True, seed=42)
    for at in (0, 7, 13, 19):  # the first step looks twice at its first member
        zo.step(lambda at=at: accuracy(model(**seen[at][0]), seen[at][0]))
    assert differing(weights(tiny("llama")), weights(model))
    assert not differing(weights(trainer.model), weights(model))
    population = [float(score) for _, score in seen[1:7]]
    assert logged(trainer, "zo_score_mean")[0] == pytest.approx(sum(population) / 6)
    assert logged(trainer, "loss")[0] == pytest.approx(-sum(population) / 6)


def test_a_number_of_compute_metrics_is_the_same_objective(tmp_path: Path) -> None:
    by_function = run(tmp_path / "function", accuracy)
    by_metrics = run(tmp_path / "metrics", "compute_metrics:accuracy", compute_metrics=metrics)
    assert differing(weights(tiny("llama")), weights(by_metrics.model))
    assert not differing(weights(by_function.model), weights(by_metrics.model))


def first(outputs: Any, inputs: Any) -> float:
    """A score near 3."""
    return 3.0 + float(outputs.logits[0, 0, 0])


def test_micro_batches_count_by_their_mean(tmp_path: Path) -> None:
    own = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1}
    trainer = run(tmp_path, first, **own)
    assert 2.0 < logged(trainer, "zo_score_mean")[0] < 4.0


@pytest.mark.parametrize("scaled", [None, True, False])
def test_micro_batches_count_by_their_mean_beside_a_loss_that_is_scaled(
    tmp_path: Path, scaled: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        return outputs.logits.sum()

    if scaled is not None and not hasattr(ZOTrainer, "loss_is_scaled_for_ga"):
        pytest.skip("this version of Trainer always takes the loss of compute_loss_func for a scaled one")
    own = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1}
    monkeypatch.setattr(ZOTrainer, "loss_is_scaled_for_ga", None, raising=False)
    plain = run(tmp_path / "plain", first, **own)
    monkeypatch.setattr(ZOTrainer, "loss_is_scaled_for_ga", scaled, raising=False)
    scored = run(tmp_path / "scored", first, compute_loss_func=loss, **own)
    assert 2.0 < logged(scored, "zo_score_mean")[0] < 4.0
    assert logged(scored, "zo_score_mean") == logged(plain, "zo_score_mean")
    assert differing(weights(tiny("llama")), weights(plain.model))
    assert not differing(weights(scored.model), weights(plain.model))


def test_evaluations_still_have_the_loss_of_the_model(tmp_path: Path) -> None:
    trainer = run(tmp_path, accuracy, eval_dataset=texts(8), compute_metrics=metrics, max_steps=1)
    plain = zo_trainer(tmp_path, eval_dataset=texts(8))
    plain.model.load_state_dict(trainer.model.state_dict())
    found = trainer.evaluate()
    assert found["eval_loss"] == plain.evaluate()["eval_loss"]
    assert 0.0 <= found["eval_accuracy"] <= 1.0


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ("accuracy", "objective='accuracy' must be a function"),
        ("compute_metrics:", "objective='compute_metrics:' must be a function"),
        ("compute_metrics:f1", "objective='compute_metrics:f1' needs compute_metrics"),
    ],
)
def test_what_is_no_objective_is_refused(tmp_path: Path, objective: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run(tmp_path, objective)


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ("compute_metrics:f1", "compute_metrics returned 'accuracy', 'other'; write one of these names"),
        (lambda outputs, inputs: outputs.logits, r"objective=<lambda> returned a tensor of shape \[4, 8, 64\]"),
        (lambda outputs, inputs: None, "objective=<lambda> returned a NoneType; return one number"),
    ],
)
def test_what_is_no_score_names_the_objective_and_moves_nothing(tmp_path: Path, objective: Any, said: str) -> None:
    with pytest.raises(LossError, match=said):
        run(tmp_path, objective, compute_metrics=metrics)
