"""Law: a `ZOTrainer` run that is killed and resumed is the uninterrupted one, and its log is the fine-tune."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import arguments, differing, logged, seedlog_trainer, texts, weights, zo_trainer
from models import tiny
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from hf_zo import ZOTrainer, ZOTrainingArguments, load_zo_adapter, save_zo_adapter
from zo_core import SeedLog, StateError, ZOConfig, replay

LOG = "seedlog.zo"


class Kill(TrainerCallback):
    """Stops the run as if the process had died, when so many steps are done."""

    def __init__(self, after: int):
        self.after = after

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.after:
            raise KeyboardInterrupt


def killed(path: Path, after: int, resume: bool = False, **changes: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        seedlog_trainer(path, callbacks=[Kill(after)], **changes).train(resume_from_checkpoint=resume)


class Drawing(ZOTrainer):
    """Its loss draws from the global generator, whatever the modes are."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) * (0.5 + torch.rand(()))


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum, 2 probes": {"zo_rule": "momentum", "zo_num_probes": 2},
    "fzoo": {"zo_estimator": "fzoo", "zo_num_probes": 3},
    "scores": {"zo_estimator": "es", "zo_num_probes": 3, "zo_maximize": True, "learning_rate": 1e-2},
    "a loss that draws": {"cls": Drawing},
    "streamed": {"zo_offload": "cpu", "zo_rule": "momentum"},
    "torch rule": {"zo_rule": "torch"},
    "second round": {"zo_estimator": "conservative", "learning_rate": 0.01},
    "second round, streamed": {"zo_estimator": "conservative", "learning_rate": 0.01, "zo_offload": "cpu"},
}


SLOW = ("fzoo", "torch rule")


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(value, id=name, marks=(pytest.mark.slow,) if name in SLOW else ())
        for name, value in VARIANTS.items()
    ],
)
@pytest.mark.parametrize("saving", [{}, {"save_strategy": "steps", "save_steps": 3}], ids=["log alone", "checkpoints"])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    saving: dict[str, Any], variant: dict[str, Any], tmp_path: Path
) -> None:
    whole = seedlog_trainer(tmp_path / "whole", **variant)
    whole.train()
    path = tmp_path / "killed"
    killed(path, 2, **variant, **saving)
    killed(path, 5, True, **variant, **saving)
    again = seedlog_trainer(path, **variant, **saving)
    forwards = []
    again.model.register_forward_hook(lambda *_: forwards.append(None))
    again.train(resume_from_checkpoint=True)
    assert differing(weights(whole.model), weights(again.model)) == []
    for key in ("learning_rate", "epoch", "zo_score_mean", "zo_score_std", "zo_score_min", "zo_score_max"):
        assert logged(again, key)[-4:] == logged(whole, key)[-4:]
    assert bool(logged(again, "zo_score_mean")) == ("zo_maximize" in variant)
    assert logged(again, "loss")[-5:] == pytest.approx(logged(whole, "loss")[-5:], rel=1e-6)
    drawing = variant.get("cls") is Drawing
    forwards_of = {"fzoo": 4, "es": 3, "conservative": 5}
    measured = 1 + 3 * 2 * forwards_of.get(variant.get("zo_estimator", ""), 2 * variant.get("zo_num_probes", 1))
    repeated = 2 * (2 if saving else 5) if drawing else 0
    assert len(forwards) == measured + repeated  # the first step that is measured measures one point twice
    one, other = (SeedLog.read(tmp_path / name / "out" / LOG) for name in ("whole", "killed"))
    assert [e.probes for e in one.steps] == [e.probes for e in other.steps]
    if not one.header["limits"]:
        fresh = tiny("llama")
        replay(fresh, other)
        assert differing(weights(whole.model), weights(fresh)) == []


def dropping() -> nn.Module:
    model = tiny("bert")
    assert any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    return model


def test_with_dropout_the_masks_after_a_restart_are_those_of_the_whole_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    variant = {"zo_dropout": True}
    runs = []
    for path, ends in ((tmp_path / "whole", ()), (tmp_path / "killed", (3, 6))):
        for end in ends:
            killed(path, end, end > 3, model=dropping(), **variant)
        runs.append(seedlog_trainer(path, model=dropping(), **variant))
        runs[-1].train(resume_from_checkpoint=bool(ends))
    assert differing(weights(runs[0].model), weights(runs[1].model)) == []
    assert "dropout is on, and the masks of a step are not in the log" in caplog.text


def test_plain_arguments_log_too_and_zo_log_switches_it_off(tmp_path: Path) -> None:
    zo_trainer(tmp_path / "a").train()
    assert len(SeedLog.read(tmp_path / "a" / "out" / LOG).steps) == 4
    args = arguments(tmp_path / "b", ZOTrainingArguments, zo_log=False)
    trainer = ZOTrainer(model=tiny("llama"), args=args, train_dataset=texts())
    trainer.train()
    assert not (tmp_path / "b" / "out" / LOG).exists()
    with pytest.raises(StateError, match="no seed log to share"):
        save_zo_adapter(trainer, tmp_path / "shared")


def test_a_new_run_keeps_the_log_of_the_old_one(tmp_path: Path) -> None:
    seedlog_trainer(tmp_path).train()
    before = (tmp_path / "out" / LOG).read_bytes()
    seedlog_trainer(tmp_path, seed=7).train()
    assert (tmp_path / "out" / "seedlog-1.zo").read_bytes() == before
    assert (tmp_path / "out" / LOG).read_bytes() != before
    seedlog_trainer(tmp_path).train()
    assert (tmp_path / "out" / "seedlog-2.zo").exists()


def test_training_twice_with_one_trainer_begins_a_second_log(tmp_path: Path) -> None:
    trainer = seedlog_trainer(tmp_path)
    trainer.train()
    trainer.train()
    model = tiny("llama")
    for name in ("seedlog-1.zo", LOG):
        replay(model, tmp_path / "out" / name)
    assert differing(weights(model), weights(trainer.model)) == []


def test_evaluating_writes_no_log(tmp_path: Path) -> None:
    seedlog_trainer(tmp_path, eval_dataset=texts(4)).evaluate()
    assert not (tmp_path / "out" / LOG).exists()


def test_a_named_checkpoint_is_taken_exactly_and_the_rest_of_the_log_is_kept(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    straight = seedlog_trainer(tmp_path, **saving)
    straight.train()
    before = (tmp_path / "out" / LOG).read_bytes()
    other = seedlog_trainer(tmp_path, **saving, data_seed=5)
    other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert (tmp_path / "out" / "seedlog-1.zo").read_bytes() == before
    assert differing(weights(straight.model), weights(other.model))
    fresh = tiny("llama")
    replay(fresh, tmp_path / "out" / LOG)
    assert differing(weights(fresh), weights(other.model)) == []


CHANGED: dict[str, tuple[dict[str, Any], str]] = {
    "estimator": ({"zo_estimator": "fzoo"}, "zo_estimator='spsa'.* zo_estimator='fzoo'"),
    "noise": ({"zo_noise": "gaussian"}, "zo_noise='rademacher'.* zo_noise='gaussian'"),
    "rule": ({"zo_rule": "momentum"}, "zo_rule='sgd'.* zo_rule='momentum'"),
    "eps": ({"zo_eps": 1e-2}, "zo_eps=0.001, and this one has zo_eps=0.01;"),
    "num_probes": ({"zo_num_probes": 2}, "zo_num_probes=1, and this one has zo_num_probes=2"),
    "clip": ({"zo_clip": 5.0}, "zo_clip=None.* zo_clip=5.0"),
    "dropout": ({"zo_dropout": True}, "zo_dropout=False.* zo_dropout=True"),
    "stochastic_rounding": ({"zo_stochastic_rounding": False}, "zo_stochastic_rounding=True.* zo_stoch.*=False"),
    "seed": ({"seed": 1}, "with seed=42, and this one has seed=1;"),
    "zo_seed": ({"zo_seed": 1}, "with zo_seed=42, and this one has zo_seed=1;"),
    "weight_decay": ({"weight_decay": 0.2}, r"weight_decay=\[?0.1.* weight_decay=\[?0.2"),
    "as an object": ({"zo_config": ZOConfig(eps=1e-2)}, " eps=0.001.* eps=0.01;"),
}


SAVING: dict[str, dict[str, Any]] = {"log alone": {}, "checkpoints": {"save_strategy": "steps", "save_steps": 2}}


@pytest.fixture(scope="module", params=SAVING)
def was_killed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a run that died after four steps and can be resumed, and how it saved."""
    path, saving = tmp_path_factory.mktemp("killed"), SAVING[request.param]
    killed(path, 4, **saving)
    shutil.copytree(path, path / "resumed")
    seedlog_trainer(path / "resumed", **saving).train(resume_from_checkpoint=True)
    assert len(SeedLog.read(path / "resumed" / "out" / LOG).steps) == 8
    shutil.rmtree(path / "resumed")
    return path, saving


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("changes", [pytest.param(value, id=name) for name, value in CHANGED.items()])
def test_changed_arguments_are_an_error_that_names_both_sides(
    changes: tuple[dict[str, Any], str], was_killed: tuple[Path, dict[str, Any]]
) -> None:
    path, saving = was_killed
    given, words = changes
    before = contents(path)
    other = seedlog_trainer(path, **{**saving, **given})
    with pytest.raises(StateError, match=words):
        other.train(resume_from_checkpoint=True)
    if saving:
        other = seedlog_trainer(path, **{**saving, **given})
        with pytest.raises(StateError, match=words):
            other.train(str(path / "out" / "checkpoint-2"))
    assert contents(path) == before  # so that it can still be resumed


def test_other_rates_and_another_model_than_those_of_the_log_are_errors_too(tmp_path: Path) -> None:
    killed(tmp_path, 4)
    for changes, words in (
        ({"learning_rate": 2e-3}, r"step 0 with learning_rate=0.001, and this run has learning_rate=0.002;"),
        ({"weight_decay": 0.0}, r"step 0 with weight_decay=\[0.1, 0.0\], and this run has weight_decay=0.0;"),
        ({"model": tiny("llama", tied=False)}, "trained 20 tensors and 21 of this model would move"),
    ):
        with pytest.raises(StateError, match=words):
            seedlog_trainer(tmp_path, **changes).train(resume_from_checkpoint=True)
    seedlog_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_without_log_and_checkpoint_resuming_is_the_error_of_trainer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        seedlog_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_half_a_checkpoint_is_not_taken(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = seedlog_trainer(tmp_path / "whole")
    whole.train()
    killed(tmp_path, 5, **saving)
    (tmp_path / "out" / "checkpoint-4" / "trainer_state.json").write_text('{"epoch"')
    (tmp_path / "out" / "checkpoint-4" / "model.safetensors").unlink()
    shutil.copytree(tmp_path / "out" / "checkpoint-2", tmp_path / "out" / "checkpoint-5")  # of another run
    again = seedlog_trainer(tmp_path, **saving)
    again.train(resume_from_checkpoint=True)
    assert differing(weights(whole.model), weights(again.model)) == []


def test_checkpoints_of_the_model_alone_are_left_for_the_log(tmp_path: Path) -> None:
    variant = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True, "zo_rule": "momentum"}
    whole = seedlog_trainer(tmp_path / "whole", **variant)
    whole.train()
    killed(tmp_path, 5, **variant)
    again = seedlog_trainer(tmp_path, **variant)
    again.train(resume_from_checkpoint=True)
    assert differing(weights(whole.model), weights(again.model)) == []


def test_a_torn_tail_costs_the_torn_step_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = seedlog_trainer(tmp_path / "whole")
    whole.train()
    killed(tmp_path, 5)
    path = tmp_path / "out" / LOG
    os.truncate(path, path.stat().st_size - 7)
    again = seedlog_trainer(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert "17 bytes of a record that was not finished; they are dropped" in caplog.text
    assert differing(weights(whole.model), weights(again.model)) == []
    assert len(SeedLog.read(path).steps) == 8


def test_the_best_model_is_what_is_shared(tmp_path: Path) -> None:
    trainer = seedlog_trainer(
        tmp_path, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, learning_rate=0.1,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", eval_dataset=texts(4, seed=1), weight_decay=0.0,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step < trainer.state.global_step
    folder = save_zo_adapter(trainer, tmp_path / "shared")
    loaded = load_zo_adapter(tiny("llama"), folder)
    assert differing(weights(loaded), weights(trainer.model)) == []


def search_space(trial: Any) -> dict[str, float]:
    return {"learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-3)}


def test_a_hyperparameter_search_has_a_log_for_each_trial(tmp_path: Path) -> None:
    args = arguments(tmp_path, TrainingArguments, max_steps=2)
    trainer = ZOTrainer(args=args, model_init=lambda: tiny("llama"), train_dataset=texts(), eval_dataset=texts(4))
    trainer.hyperparameter_search(hp_space=search_space, n_trials=2, backend="optuna")
    found = sorted(tmp_path.rglob("seedlog*.zo"))
    assert [len(SeedLog.read(path).steps) for path in found] == [2, 2]


# The process

SLEEPER = """
import sys, time
sys.path.insert(0, "tests/helpers")
from pathlib import Path
import torch
from hf_helpers import arguments, texts
from models import tiny
from transformers import TrainerCallback
from hf_zo import ZOTrainer

class Slow(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        print(state.global_step, flush=True)
        time.sleep(0.05)

args = arguments(Path(sys.argv[1]), max_steps=2000, logging_strategy="no")
ZOTrainer(model=tiny("llama"), args=args, train_dataset=texts(), callbacks=[Slow()]).train()
print("done", flush=True)
"""


@pytest.mark.slow
def test_sigterm_ends_the_run_with_its_log_complete(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    run = subprocess.Popen(
        [sys.executable, "-c", SLEEPER, str(tmp_path)],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    for line in run.stdout:
        if line.strip() == "5":
            run.send_signal(signal.SIGTERM)
            break
    output, errors = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM, errors
    assert "done" not in output
    log = SeedLog.read(tmp_path / "out" / LOG)
    assert len(log.steps) >= 5
    assert (log.torn, log.corrupt) == (0, None)


def test_somebody_elses_handler_of_sigterm_stays(tmp_path: Path) -> None:
    def mine(number: int, frame: Any) -> None: ...

    before = signal.signal(signal.SIGTERM, mine)
    try:
        seen: list[Any] = []

        class Look(TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                seen.append(signal.getsignal(signal.SIGTERM))

        seedlog_trainer(tmp_path, callbacks=[Look()], max_steps=1).train()
        assert seen == [mine]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert signal.getsignal(signal.SIGTERM) is before
