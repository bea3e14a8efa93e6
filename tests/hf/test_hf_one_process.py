"""Law: a run that is interrupted and goes on in the same process is the uninterrupted one; a second run is its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import differing, logged, seedlog_trainer, texts, weights, zo_trainer
from models import tiny
from transformers import TrainerCallback

from hf_zo import ZOTrainer
from hf_zo.preparing import undivided
from zo_core import SeedLog, StateError, replay
from zo_core.rules import Momentum

LOG = "seedlog.zo"
LOW_RANK = {"name": "low_rank", "refresh": 3}


class Interrupt(TrainerCallback):
    """Ctrl-C, as often as there are steps in the list."""

    def __init__(self, *after: int):
        self.after = list(after)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.after and state.global_step == self.after[0]:
            self.after.pop(0)
            raise KeyboardInterrupt


class Drawing(ZOTrainer):
    """Its loss draws from the global generator."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) * (0.5 + torch.rand(()))


def stopped(path: Path, *after: int, **changes: Any) -> Any:
    """A trainer that was interrupted, for the first time, after so many steps."""
    trainer = seedlog_trainer(path, callbacks=[Interrupt(*after)], **changes)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    return trainer


def final(trainer: Any) -> dict[str, torch.Tensor]:
    trainer.zo.close()
    return weights(trainer.model)


VARIANTS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "momentum, 2 probes": {"zo_rule": "momentum", "zo_num_probes": 2},
    "low rank": {"zo_rule": "momentum", "zo_noise": LOW_RANK},
    "fzoo": {"zo_estimator": "fzoo", "zo_num_probes": 3},
    "sparse": {"zo_noise": "sparse", "zo_rule": "momentum"},
    "a loss that draws": {"cls": Drawing},
    "streamed": {"zo_offload": "cpu", "zo_rule": "momentum"},
    "streamed, low rank": {"zo_offload": "cpu", "zo_rule": "momentum", "zo_noise": LOW_RANK},
    "streamed from disk": {"zo_offload": "disk"},
    "AdamW": {"zo_rule": "torch"},
}
SLOW = ("fzoo", "sparse", "streamed from disk", "AdamW")
EACH = [pytest.param(v, id=name, marks=[pytest.mark.slow] if name in SLOW else []) for name, v in VARIANTS.items()]
SAVING = {"log alone": {}, "checkpoints": {"save_strategy": "steps", "save_steps": 3}}


@pytest.mark.parametrize("variant", EACH)
@pytest.mark.parametrize("saving", [pytest.param(value, id=name) for name, value in SAVING.items()])
def test_an_interrupted_run_goes_on(saving: dict[str, Any], variant: dict[str, Any], tmp_path: Path) -> None:
    whole = seedlog_trainer(tmp_path / "whole", **variant)
    whole.train()
    trainer = stopped(tmp_path / "stopped", 2, 5, **variant, **saving)
    torch.rand(5)  # what a notebook does in between
    with pytest.raises(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=True)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 8
    assert differing(final(whole), final(trainer)) == []
    for key in ("learning_rate", "epoch"):
        assert logged(trainer, key)[-3:] == logged(whole, key)[-3:]
    one, other = (SeedLog.read(tmp_path / name / "out" / LOG) for name in ("whole", "stopped"))
    assert [(e.step, e.probes, e.lrs) for e in one.steps] == [(e.step, e.probes, e.lrs) for e in other.steps]


def test_steps_that_are_in_the_weights_are_not_measured_again(tmp_path: Path) -> None:
    trainer = stopped(tmp_path, 5)
    forwards: list[None] = []
    trainer.model.register_forward_hook(lambda *_: forwards.append(None))
    trainer.train(resume_from_checkpoint=True)
    assert len(forwards) == 3 * 2 * 2


@pytest.mark.parametrize("where", [None, "cpu"], ids=["resident", "streamed"])
def test_an_interrupt_in_the_middle_of_a_measurement_costs_that_step_alone(where: str | None, tmp_path: Path) -> None:
    whole = seedlog_trainer(tmp_path / "whole", zo_offload=where)
    whole.train()
    trainer = seedlog_trainer(tmp_path / "stopped", zo_offload=where)
    calls = []

    def interrupt(*_: Any) -> None:
        calls.append(None)
        if len(calls) == 11:  # of 4 in a step
            raise KeyboardInterrupt

    handle = trainer.model.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    handle.remove()
    trainer.train(resume_from_checkpoint=True)
    assert differing(final(whole), final(trainer)) == []


def test_an_update_that_was_cut_in_half_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = seedlog_trainer(tmp_path, zo_rule="momentum")
    update, moved = Momentum.update, []

    def torn(self: Momentum, *args: Any) -> None:
        moved.append(None)
        if len(moved) == 50:
            raise KeyboardInterrupt
        update(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Momentum, "update", torn)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    with pytest.raises(StateError, match="began with other weights than this model has"):
        trainer.train(resume_from_checkpoint=True)


def test_weights_that_were_changed_in_between_are_not_gone_on_with(tmp_path: Path) -> None:
    trainer = stopped(tmp_path, 4)
    trainer.model.lm_head.weight.data[0, 0] += 1.0
    with pytest.raises(StateError, match="began with other weights than this model has"):
        trainer.train(resume_from_checkpoint=True)
    other = stopped(tmp_path / "other", 4)
    path = tmp_path / "other" / "out" / LOG
    path.write_bytes(SeedLog.read(path).upto(2))
    with pytest.raises(StateError, match="began with other weights than this model has"):
        other.train(resume_from_checkpoint=True)


def test_evaluations_of_repeated_steps_are_those_of_the_first_time(tmp_path: Path) -> None:
    def settings() -> dict[str, Any]:
        return {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": texts(4, seed=1), "learning_rate": 0.1,
                "save_strategy": "steps", "save_steps": 2, "save_only_model": True, "eval_on_start": True}  # fmt: skip

    whole = seedlog_trainer(tmp_path / "whole", **settings())
    whole.train()
    trainer = stopped(tmp_path / "stopped", 5, 3, **settings())
    now = trainer.evaluate()["eval_loss"]
    with pytest.raises(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.evaluate()["eval_loss"] == now  # of the weights in memory, whatever step was being repeated
    assert now not in logged(whole, "eval_loss")
    trainer.train(resume_from_checkpoint=True)
    assert len(set(logged(whole, "eval_loss"))) == 5
    assert logged(trainer, "eval_loss") == logged(whole, "eval_loss")
    for step in (2, 4, 6, 8):
        kept = [tmp_path / name / "out" / f"checkpoint-{step}" / "model.safetensors" for name in ("whole", "stopped")]
        assert kept[0].read_bytes() == kept[1].read_bytes()


# A second run


@pytest.mark.parametrize("variant", EACH)
def test_a_second_run_draws_other_directions_and_its_log_replays(variant: dict[str, Any], tmp_path: Path) -> None:
    trainer = seedlog_trainer(tmp_path, **variant)
    trainer.train()
    model = tiny("llama")
    trainer.train()
    logs = [SeedLog.read(tmp_path / "out" / name) for name in ("seedlog-1.zo", LOG)]
    seeds = [{probe.seed for entry in log.steps for probe in entry.probes} for log in logs]
    assert seeds[0]
    assert seeds[1]
    assert not seeds[0] & seeds[1]
    if variant.get("zo_rule") == "torch":
        return
    for log in logs:
        replay(model, log)
    assert differing(weights(model), final(trainer)) == []


def test_a_third_run_is_like_neither_and_two_scripts_are_alike(tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        trainer = seedlog_trainer(tmp_path / name)
        for _ in range(3):
            trainer.train()
        found.append(weights(trainer.model))
        logs = [SeedLog.read(path) for path in sorted((tmp_path / name / "out").glob("*.zo"))]
        assert len({entry.settings.seed for log in logs for entry in log.steps}) == 3
    assert differing(*found) == []


@pytest.mark.parametrize("variant", [{}, {"zo_rule": "momentum", "zo_noise": LOW_RANK}], ids=["sgd", "low rank"])
def test_a_second_run_is_resumed_in_another_process(variant: dict[str, Any], tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = seedlog_trainer(tmp_path / "whole", **variant)
    whole.train()
    whole.train()
    first = seedlog_trainer(tmp_path / "killed", callbacks=[Interrupt(8, 5)], **variant, **saving)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    with pytest.raises(KeyboardInterrupt):
        first.train()
    again = seedlog_trainer(tmp_path / "killed", **variant, **saving)
    again.train(resume_from_checkpoint=True)
    assert differing(final(whole), final(again)) == []


def test_a_run_that_failed_before_its_first_step_is_not_the_first(tmp_path: Path) -> None:
    whole = seedlog_trainer(tmp_path / "whole")
    whole.train()
    trainer = seedlog_trainer(tmp_path / "failed")
    handle = trainer.model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    handle.remove()
    trainer.train()
    assert differing(weights(whole.model), weights(trainer.model)) == []


def test_undivided_batches_are_those_of_one_process_with_its_settings(tmp_path: Path) -> None:
    trainer = zo_trainer(tmp_path, data_seed=7, accelerator_config={"non_blocking": True})
    alone = trainer.get_train_dataloader()
    with undivided(trainer.accelerator):
        every = trainer.get_train_dataloader()
    pairs = list(zip(alone, every, strict=True))
    assert all(torch.equal(one["input_ids"], other["input_ids"]) for one, other in pairs)
    assert every._non_blocking
