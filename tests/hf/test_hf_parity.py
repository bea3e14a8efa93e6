"""Law: `ZOTrainer` is a bare `ZeroOrder` loop on the plain `Trainer`'s data, groups and schedule, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import Weights, arguments, bare_loop, batches, differing, logged, texts, weights
from models import tiny
from transformers import TrainingArguments

from hf_zo import ZOTrainer, ZOTrainingArguments
from zo_core import ZeroOrder, ZOConfig
from zo_core.checkpoint import next_seed
from zo_core.defaults import NEWTON
from zo_core.normaliser import CURVATURE

RUNS: dict[str, dict[str, Any]] = {
    "constant": {},
    "warmup and linear decay, two epochs": {"lr_scheduler_type": "linear", "warmup_steps": 2, "num_train_epochs": 2},
    "weight decay": {"weight_decay": 0.1, "lr_scheduler_type": "cosine"},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "uneven accumulation": {"gradient_accumulation_steps": 3, "num_train_epochs": 2},
    "another seed": {"seed": 7},
    "another data seed": {"data_seed": 7},
    "last batch smaller": {"per_device_train_batch_size": 5},
}


def train(args: TrainingArguments, model: str = "llama", resume: Path | None = None, **settings: Any) -> ZOTrainer:
    """A finished run on `texts`."""
    config = ZOConfig(**settings) if settings else None
    trainer = ZOTrainer(model=tiny(model), args=args, train_dataset=texts(), zo_config=config)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """What a run with default settings ends with."""
    return weights(train(arguments(tmp_path_factory.mktemp("default"))).model)


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS.keys())
def test_training_ends_with_the_weights_of_the_bare_loop(tmp_path: Path, changes: dict[str, Any]) -> None:
    args = arguments(tmp_path, **changes)
    trainer, bare = train(args), tiny("llama")
    records = bare_loop(bare, args, texts())
    assert not differing(weights(trainer.model), weights(bare))
    assert differing(weights(bare), weights(tiny("llama")))
    assert trainer.state.global_step == trainer.zo.step_count == len(records)
    assert logged(trainer, "learning_rate") == [record.lr for record in records]
    assert logged(trainer, "projected_grad") == pytest.approx([abs(r.projected_grad) for r in records], rel=1e-12)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_so_it_does_with_dropout_biases_and_two_stacks(tmp_path: Path, name: str) -> None:
    args = arguments(tmp_path, weight_decay=0.1, gradient_accumulation_steps=2)
    bare = tiny(name)
    bare_loop(bare, args, texts())
    assert not differing(weights(train(args, name).model), weights(bare))


SETTINGS: dict[str, dict[str, Any]] = {
    "momentum": {"rule": "momentum"},
    "sign": {"rule": "sign"},
    "gaussian": {"noise": "gaussian"},
    "three directions": {"num_probes": 3, "eps": 1e-2},
    "fzoo": {"estimator": "fzoo", "num_probes": 2, "eps": 1e-4},
    "clip": {"clip": 0.1},
    "seed": {"seed": 123},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_every_setting_reaches_the_engine(tmp_path: Path, settings: dict[str, Any], default: Weights) -> None:
    args = arguments(tmp_path)
    bare = tiny("llama")
    bare_loop(bare, args, texts(), **settings)
    assert not differing(weights(train(args, **settings).model), weights(bare))
    assert differing(default, weights(bare))


class Noting(ZOTrainer):
    """Keeps the state of torch's global generator at the start of each step."""

    def training_step(self, *args: Any) -> torch.Tensor:
        self.states.append(torch.get_rng_state())
        return super().training_step(*args)


def test_with_dropout_all_probes_of_a_step_draw_the_masks_that_its_forward_would(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    trainer = Noting(model=tiny("bert"), args=args, train_dataset=texts(), zo_config=ZOConfig(dropout=True))
    trainer.states = []
    trainer.train()
    bare = tiny("bert")
    zo = ZeroOrder(bare, seed=args.seed, lr=args.learning_rate, dropout=True)
    for state, (batch,) in zip(trainer.states, batches(bare, args, texts()), strict=True):
        torch.set_rng_state(state)
        zo.step(lambda batch=batch: bare(**batch).loss)
    assert not differing(weights(trainer.model), weights(bare))
    assert differing(weights(bare), weights(train(args, "bert").model))


def test_two_micro_batches_measure_the_loss_of_the_whole_batch(tmp_path: Path) -> None:
    lr = 1e-6
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    halves = train(arguments(tmp_path, learning_rate=lr, **changes))
    whole = train(arguments(tmp_path, learning_rate=lr))
    # The losses are about 4 and sums of some 20 float32 terms: each is off by less than 20 * 4 * 2**-24, and the
    # projected gradient, a difference of two of them over 2 eps, by less than 20 * 4 * 2**-24 / eps.
    error = 20 * 4 * 2**-24 / 1e-3
    assert logged(halves, "loss") == pytest.approx(logged(whole, "loss"), abs=20 * 4 * 2**-24)
    assert logged(halves, "projected_grad") == pytest.approx(logged(whole, "projected_grad"), abs=error)
    expected = weights(whole.model)
    for name, value in weights(halves.model).items():
        assert torch.allclose(value, expected[name], rtol=2**-22, atol=4 * lr * error)


@pytest.mark.parametrize("steps", [3, 4], ids=["in mid-epoch", "between epochs"])
@pytest.mark.parametrize("settings", [{}, {"rule": "momentum"}, {"dropout": True}], ids=["sgd", "momentum", "dropout"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, steps: int, settings: dict[str, Any]
) -> None:
    changes = {"num_train_epochs": 2, "lr_scheduler_type": "linear", "warmup_steps": 2, "weight_decay": 0.1}
    args = arguments(tmp_path, save_strategy="steps", save_steps=steps, **changes)
    whole = train(args, "bert", **settings)
    resumed = train(args, "bert", resume=tmp_path / "out" / f"checkpoint-{steps}", **settings)
    assert not differing(weights(whole.model), weights(resumed.model))
    assert logged(whole, "loss") == logged(resumed, "loss")
    assert logged(whole, "projected_grad") == logged(resumed, "projected_grad")


def test_a_resumed_run_in_bfloat16_with_accumulation_too(tmp_path: Path) -> None:
    changes = {"num_train_epochs": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    args = arguments(tmp_path, save_strategy="steps", save_steps=3, **changes)
    runs = []
    for resume in (None, str(tmp_path / "out" / "checkpoint-3")):
        trainer = ZOTrainer(model=tiny("llama", dtype=torch.bfloat16), args=args, train_dataset=texts())
        trainer.train(resume_from_checkpoint=resume)
        runs.append(weights(trainer.model))
    assert not differing(*runs)


def test_a_second_call_of_train_starts_again_at_step_0_with_the_weights_it_finds(tmp_path: Path) -> None:
    args = arguments(tmp_path, lr_scheduler_type="linear", warmup_steps=1)
    trainer = train(args)
    trainer.train()
    bare = tiny("llama")
    bare_loop(bare, args, texts())
    bare_loop(bare, args, texts(), seed=next_seed(args.seed))
    assert not differing(weights(trainer.model), weights(bare))


def test_plain_arguments_and_zo_arguments_train_alike(tmp_path: Path) -> None:
    settings = {"eps": 1e-2, "num_probes": 2, "noise": "gaussian"}
    plain = train(arguments(tmp_path), **settings)
    fields = {f"zo_{name}": value for name, value in settings.items()}
    args = arguments(tmp_path, ZOTrainingArguments, **fields)
    assert not differing(weights(plain.model), weights(train(args).model))


def test_without_a_rate_steps_are_normalised_by_the_curvature_and_the_rate_decays(tmp_path: Path) -> None:
    args = ZOTrainingArguments(
        str(tmp_path), use_cpu=True, dataloader_pin_memory=False, report_to="none", disable_tqdm=True,
        per_device_train_batch_size=4, num_train_epochs=1, save_strategy="no",
    )  # fmt: skip
    trainer = train(args)
    bare = train(arguments(tmp_path, lr_scheduler_type="linear", learning_rate=NEWTON), normalise=CURVATURE)
    assert not differing(weights(bare.model), weights(trainer.model))
    assert trainer.zo is not None
    assert (trainer.args.learning_rate, trainer.zo.lr) == (None, 0.0)


def test_the_seed_of_the_arguments_is_the_seed_of_the_directions_unless_zo_seed_is_given(tmp_path: Path) -> None:
    args = arguments(tmp_path, data_seed=1, seed=3)
    assert train(args).zo.seed == 3
    assert train(args, seed=4).zo.seed == 4
    same_data = [logged(train(arguments(tmp_path, data_seed=1, seed=s), seed=4), "projected_grad") for s in (3, 5)]
    assert same_data[0] == same_data[1]


def test_a_learning_rate_in_the_config_goes_before_that_of_the_arguments(tmp_path: Path) -> None:
    trainer = train(arguments(tmp_path), lr=3e-7, weight_decay=0.01)
    assert logged(trainer, "learning_rate") == [3e-7] * 4
    assert {group["weight_decay"] for group in trainer.zo.optimizer.param_groups} == {0.01, 0.0}
