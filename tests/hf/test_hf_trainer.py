"""Law: around its steps a `ZOTrainer` behaves as `Trainer` does: callbacks, evaluation, precision, logs."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import Batch, arguments, bare_loop, differing, logged, texts, weights, zo_trainer
from models import tiny
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
)

from hf_zo import ZOTrainer, ZOTrainerMixin, ZOTrainingArguments
from zo_core import StepRecord, ZOConfig

# Callbacks, evaluation, checkpoints


class Interrupt(TrainerCallback):
    """Ends the first run after one step, between two micro-batches."""

    def __init__(self) -> None:
        self.armed = True

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.armed and state.global_step == 1:
            self.armed = False
            raise KeyboardInterrupt


def test_a_run_forgets_what_an_interrupted_one_had_measured_and_not_logged(tmp_path: Path) -> None:
    settings = {"gradient_accumulation_steps": 2, "num_train_epochs": 2, "logging_steps": 2, "learning_rate": 0.0}
    interrupted = zo_trainer(tmp_path, callbacks=[Interrupt()], **settings)
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    interrupted.train()
    whole = zo_trainer(tmp_path, **settings)
    for _ in range(2):  # a second run draws directions of its own
        whole.train()
    assert logged(interrupted, "projected_grad") == logged(whole, "projected_grad")


class Events(TrainerCallback):
    """Every event with its step, and whether optimizer, scheduler and model were there to see."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        self.rates: list[float] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def note(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seen.append((name, state.global_step))
            if name == "on_pre_optimizer_step":
                assert kwargs["lr_scheduler"].get_last_lr()[0] == kwargs["optimizer"].param_groups[0]["lr"]
                assert kwargs["model"] is not None
                self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])

        return note


def test_callbacks_see_the_events_and_rates_that_trainer_would_show_them(tmp_path: Path) -> None:
    settings = {"gradient_accumulation_steps": 2, "lr_scheduler_type": "linear", "eval_strategy": "steps"}
    settings |= {"eval_steps": 1, "num_train_epochs": 2, "save_strategy": "epoch", "eval_dataset": texts(4)}
    events = {}
    for cls in (Trainer, ZOTrainer):
        events[cls] = Events()
        zo_trainer(tmp_path / cls.__name__, cls=cls, callbacks=[events[cls]], **settings).train()
    assert events[ZOTrainer].seen == events[Trainer].seen
    assert events[ZOTrainer].seen.count(("on_substep_end", 0)) == 1
    assert events[ZOTrainer].rates == events[Trainer].rates == [1e-3, 7.5e-4, 5e-4, 2.5e-4]


class Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 2


def test_a_callback_can_stop_the_run(tmp_path: Path) -> None:
    trainer = zo_trainer(tmp_path, callbacks=[Stop()])
    assert trainer.train().global_step == 2


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def test_evaluation_sees_the_weights_themselves_in_eval_mode(tmp_path: Path) -> None:
    settings = {"compute_metrics": accuracy, "eval_dataset": texts(8, seed=1), "eval_strategy": "epoch"}
    trainer = zo_trainer(tmp_path, "bert", **settings)
    trainer.train()
    plain = zo_trainer(tmp_path, "bert", Trainer, **settings)
    plain.model.load_state_dict(trainer.model.state_dict())
    wanted = plain.evaluate()
    assert logged(trainer, "eval_loss") == [wanted["eval_loss"]] == [trainer.evaluate()["eval_loss"]]
    assert logged(trainer, "eval_accuracy")[0] == wanted["eval_accuracy"]
    assert (trainer.predict(texts(5)).predictions == plain.predict(texts(5)).predictions).all()


def test_the_best_weights_come_back_and_early_stopping_stops(tmp_path: Path) -> None:
    trainer = zo_trainer(
        tmp_path, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, num_train_epochs=4,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=False,
        learning_rate=0.1, callbacks=[EarlyStoppingCallback(2)], eval_dataset=texts(4, seed=1),
    )  # fmt: skip
    trainer.train()
    losses = logged(trainer, "eval_loss")
    best = losses.index(min(losses))
    assert trainer.state.global_step == len(losses) == best + 3 < 16
    assert trainer.evaluate()["eval_loss"] == min(losses) < losses[-1]


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Batch]:
        yield from texts(12)


def test_a_stream_without_a_length_trains_for_max_steps(tmp_path: Path) -> None:
    settings = {"max_steps": 5, "lr_scheduler_type": "linear"}
    args = arguments(tmp_path, **settings)
    trainer, bare = ZOTrainer(model=tiny("llama"), args=args, train_dataset=Stream()), tiny("llama")
    trainer.train()
    bare_loop(bare, args, Stream())
    assert trainer.state.global_step == 5
    assert not differing(weights(trainer.model), weights(bare))


# Precision


def test_bf16_computes_the_probes_under_autocast(tmp_path: Path) -> None:
    trainer, bare = zo_trainer(tmp_path, bf16=True), tiny("llama")
    trainer.train()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(**batch).loss

    records = bare_loop(bare, arguments(tmp_path), texts(), loss)
    assert not differing(weights(trainer.model), weights(bare))
    exact = bare_loop(tiny("llama"), arguments(tmp_path), texts())
    assert [r.projected_grad for r in records] != [r.projected_grad for r in exact]


class Dtypes(ZOTrainer):
    seen: set[torch.dtype]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.seen.add(loss.dtype)
        return loss


def test_a_model_in_bfloat16_trains_with_float32_losses(tmp_path: Path) -> None:
    model = tiny("t5", dtype=torch.bfloat16)
    batch = {name: value[None] for name, value in texts(1)[0].items()}
    assert model(**batch).loss.dtype == torch.bfloat16
    trainer = Dtypes(model=model, args=arguments(tmp_path), train_dataset=texts())
    trainer.seen = set()
    trainer.train()
    assert trainer.seen == {torch.float32}
    assert differing(weights(model), weights(tiny("t5", dtype=torch.bfloat16)))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


# Logs


def test_logs_have_the_projected_gradient_in_place_of_the_gradients_norm(tmp_path: Path) -> None:
    trainer = zo_trainer(tmp_path, logging_steps=2, zo_config=ZOConfig(clip=0.2, num_probes=2))
    records: list[StepRecord] = []
    trainer.create_optimizer()
    trainer.zo.listeners.append(records.append)
    trainer.train()
    first, second, _ = trainer.state.log_history
    assert {"projected_grad", "zo_loss_mean", "zo_loss_se", "zo_lr"} < set(first)
    assert not [name for name in first if "clip_rate" in name or "grad_norm" in name]
    for entry, steps in ((first, records[:2]), (second, records[2:])):
        mean_square = sum(step.projected_grad**2 for step in steps) / 2
        assert entry["projected_grad"] == pytest.approx(math.sqrt(mean_square), rel=1e-12)
        assert entry.get("zo_clipped_directions", 0) == sum(step.clipped for step in steps)
        assert entry["zo_lr"] == steps[-1].lr
    assert sum(step.clipped for step in records) > 0


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_running_mean_is_that_of_the_losses_in_the_lines(tmp_path: Path, accumulated: int) -> None:
    trainer = zo_trainer(tmp_path, gradient_accumulation_steps=accumulated, learning_rate=1e-2, num_train_epochs=2)
    trainer.train()
    losses, means = logged(trainer, "loss"), logged(trainer, "zo_loss_mean")
    for count, mean in enumerate(means, 1):
        assert mean == pytest.approx(sum(losses[:count]) / count, rel=1e-6)
    assert len(means) == 8 // accumulated
    assert len(logged(trainer, "zo_loss_se")) == len(means) - 1


@pytest.mark.parametrize("how", ["repeated from the log", "from a named checkpoint", "from the first step"])
def test_the_numbers_of_a_resumed_run_are_those_of_the_whole_one(tmp_path: Path, how: str) -> None:
    settings = {"learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear"}
    whole, resumed = (zo_trainer(tmp_path, zo_config=ZOConfig(clip=0.5), **settings) for _ in range(2))
    whole.train()
    if how == "from the first step":
        for folder in Path(whole.args.output_dir).glob("checkpoint-*"):
            shutil.rmtree(folder)
    if how == "repeated from the log":
        shutil.rmtree(Path(whole.args.output_dir) / "checkpoint-4")
    resumed.train(f"{whole.args.output_dir}/checkpoint-2" if "named" in how else True)
    for name in ("loss", "zo_loss_mean", "zo_loss_se", "zo_lr"):
        assert logged(resumed, name) == logged(whole, name)


class Nan(ZOTrainer):
    """The second step meets a loss that is not a number."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss * math.nan if self.state.global_step == 1 else loss


class Keep(TrainerCallback):
    def __init__(self) -> None:
        self.weights: list[Any] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.weights.append(weights(model))


def test_a_loss_that_is_not_a_number_skips_the_step_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keep = Keep()
    trainer = zo_trainer(tmp_path, cls=Nan, callbacks=[keep], weight_decay=0.1)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert not differing(keep.weights[0], keep.weights[1])
    assert differing(keep.weights[1], keep.weights[2])
    assert [math.isnan(loss) for loss in logged(trainer, "loss")] == [False, True, False, False]
    assert [math.isnan(grad) for grad in logged(trainer, "projected_grad")] == [False, True, False, False]
    assert [entry.get("zo_skipped_steps") for entry in trainer.state.log_history[:4]] == [None, 1.0, None, None]
    assert [record.message.split(":")[0] for record in caplog.records] == ["step 1 skipped, weights untouched"]


# Other trainers and arguments


class ZOSeq2SeqTrainer(ZOTrainerMixin, Seq2SeqTrainer):
    pass


def test_seq2seq_trains_and_generates_in_two_lines(tmp_path: Path) -> None:
    args = arguments(tmp_path, Seq2SeqTrainingArguments, predict_with_generate=True, generation_max_length=6)
    trainer, bare = ZOSeq2SeqTrainer(tiny("t5"), args, train_dataset=texts(), eval_dataset=texts(4)), tiny("t5")
    trainer.train()
    bare_loop(bare, arguments(tmp_path), texts())
    assert not differing(weights(trainer.model), weights(bare))
    plain = Seq2SeqTrainer(bare, args, eval_dataset=texts(4))
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    generated = [each.predict(texts(4), max_length=6).predictions for each in (trainer, plain)]
    assert (generated[0] == generated[1]).all()


def test_the_arguments_parse_from_a_command_line(tmp_path: Path) -> None:
    line = f"--output_dir {tmp_path} --use_cpu --learning_rate 1e-4 --zo_eps 1e-2 --zo_num_probes 4 --zo_noise gaussian"
    line += " --zo_dropout --zo_rule momentum --zo_clip 10 --zo_seed 3 --no_zo_stochastic_rounding"
    (args,) = HfArgumentParser(ZOTrainingArguments).parse_args_into_dataclasses(line.split())
    assert args.to_zo_config() == ZOConfig(
        eps=1e-2, num_probes=4, noise="gaussian", dropout=True, rule="momentum", clip=10.0, seed=3,
        stochastic_rounding=False,
    )  # fmt: skip
    assert (args.learning_rate, args.lr_scheduler_type, args.max_grad_norm) == (1e-4, "linear", 0.0)
    (plain,) = HfArgumentParser(ZOTrainingArguments).parse_args_into_dataclasses(["--output_dir", str(tmp_path)])
    assert plain.to_zo_config() == ZOConfig()
