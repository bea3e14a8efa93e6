"""Law: under `ZOTrainer` a second round measures what the first has measured, on every path to a step."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import arguments, bare_loop, differing, logged, texts, weights, zo_trainer
from models import tiny
from torch import Tensor
from trl_helpers import ROWS, sft

from hf_zo import ZOTrainer
from zo_core import SeedLog, ZOConfig, replay

CONSERVATIVE = ZOConfig(estimator="conservative")
RUNS: dict[str, dict[str, Any]] = {
    "constant": {"num_train_epochs": 2},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "num_train_epochs": 2},
    "uneven accumulation": {"gradient_accumulation_steps": 3, "num_train_epochs": 2},
    "schedule": {"lr_scheduler_type": "linear", "warmup_steps": 2, "num_train_epochs": 2},
}
PLACES: list[dict[str, Any]] = [{}, {"offload": "cpu"}, {"offload": "disk"}]


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        pytest.param(changes, place, id=f"{name}-{place.get('offload', 'resident')}", marks=slow)
        for name, changes in RUNS.items()
        for place in PLACES
        for slow in [[pytest.mark.slow] if place.get("offload") == "disk" and name != "uneven accumulation" else []]
    ],
)
def test_training_ends_with_the_weights_of_the_bare_loop(
    changes: dict[str, Any], place: dict[str, Any], tmp_path: Path
) -> None:
    args = arguments(tmp_path, **{"learning_rate": 0.01, **changes})
    bare = tiny("llama")
    records = bare_loop(bare, args, texts(), estimator="conservative")
    assert {record.probes[0].coefficient * record.projected_grad > 0 for record in records} == {True, False}
    trainer = ZOTrainer(model=tiny("llama"), args=args, train_dataset=texts(), zo_config=CONSERVATIVE.replace(**place))
    trainer.train()
    trainer.zo.close(torch.device("cpu"))
    assert not differing(weights(trainer.model), weights(bare))
    assert logged(trainer, "projected_grad") == pytest.approx([abs(r.projected_grad) for r in records], rel=1e-12)
    again = tiny("llama")
    replay(again, tmp_path / "out" / "seedlog.zo")
    assert not differing(weights(again), weights(bare))


class Watching(ZOTrainer):
    """Notes what each call of its loss finds, and counts calls and tokens; its loss draws and has dropout."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        here = torch.rand(()).item(), torch.is_autocast_enabled("cpu"), self.calls, torch.is_grad_enabled()
        self.seen.append((int(inputs["input_ids"].sum()), *here))
        return super().compute_loss(model, inputs, *args, **kwargs)

    def compute_loss_context_manager(self) -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.starts.append(torch.get_rng_state())
        return super().training_step(*args, **kwargs)


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_both_rounds_of_a_micro_batch_see_the_same(offload: str | None, tmp_path: Path) -> None:
    runs = []
    for estimator in ("spsa", "conservative"):
        config = ZOConfig(estimator=estimator, dropout=True, offload=offload)
        torch.manual_seed(0)
        trainer = zo_trainer(
            tmp_path, "bert", Watching, zo_config=config, gradient_accumulation_steps=2, learning_rate=0.0
        )
        trainer.seen, trainer.starts = [], []
        trainer.train()
        runs.append(trainer)
    plain, twice = runs
    # Two micro-batches a step: two probes of each, and then three.
    first, second = twice.seen[-10:-6], twice.seen[-6:]
    assert len(set(first[:2])) == len(set(first[2:])) == 1
    assert second == [first[0]] * 3 + [first[2]] * 3
    assert first[0] != first[2]
    assert first[0][2] is True  # under autocast, in which the trainer's optimizer does not step
    assert twice.calls == plain.calls == 4
    assert all(torch.equal(a, b) for a, b in zip(plain.starts, twice.starts, strict=True))


def test_metrics_and_tokens_of_trl_count_once(tmp_path: Path, tokenizer: Any) -> None:
    histories = []
    for estimator in ("spsa", "conservative"):
        config = ZOConfig(estimator=estimator)
        trainer = sft(tmp_path, tokenizer, zo_config=config, gradient_accumulation_steps=2, learning_rate=0.0)
        trainer.train()
        histories.append(
            [{k: v for k, v in e.items() if "second" not in k and "time" not in k} for e in trainer.state.log_history]
        )
    tokens = sum(len(row.split()) + 1 for row in ROWS)
    assert histories[1][-2]["num_tokens"] == tokens
    assert histories[0] == histories[1]


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_an_exception_in_the_second_round_ends_a_run_that_can_go_on(offload: str | None, tmp_path: Path) -> None:
    class Failing(ZOTrainer):
        fails = False

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            if self.fails and self.zo.directions.plan.probes:
                raise KeyboardInterrupt
            return super().compute_loss(*args, **kwargs)

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            self.fails = self.interrupts and self.state.global_step == 2
            return super().training_step(*args, **kwargs)

    settings: dict[str, Any] = {"num_train_epochs": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.01}
    config = CONSERVATIVE.replace(offload=offload)
    whole, broken = (
        zo_trainer(tmp_path / name, cls=Failing, zo_config=config, **settings) for name in ("whole", "broken")
    )
    whole.interrupts, broken.interrupts = False, True
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    broken.interrupts = broken.fails = False
    broken.train(resume_from_checkpoint=True)
    assert not differing(weights(broken.model), weights(whole.model))
    one, other = (SeedLog.read(tmp_path / name / "out" / "seedlog.zo") for name in ("whole", "broken"))
    assert [entry.probes for entry in one.steps] == [entry.probes for entry in other.steps]


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_batches_are_released_after_each_step(offload: str | None, tmp_path: Path) -> None:
    class Holding(ZOTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            if self.state.global_step != self.last:  # the first micro-batch of a step
                self.last = self.state.global_step
                gc.collect()
                assert all(held() is None for held in self.held)
            self.held.append(weakref.ref(inputs["labels"]))
            return super().training_step(model, inputs, *args, **kwargs)

    trainer = zo_trainer(
        tmp_path, cls=Holding, zo_config=CONSERVATIVE.replace(offload=offload),
        gradient_accumulation_steps=2, num_train_epochs=2,
    )  # fmt: skip
    trainer.held, trainer.last = [], None
    trainer.train()
    assert len(trainer.held) >= 4
