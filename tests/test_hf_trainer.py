"""Law: around its steps a `ZOTrainer` behaves as `Trainer` does, and inside them it leaves no trace."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_helpers import Batch, arguments, bare_loop, batches, differing, groups, logged, run, texts, weights
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
from transformers.trainer_pt_utils import LabelSmoother

from hf_zo import ZOTrainer, ZOTrainerMixin, ZOTrainingArguments
from zo_core import ZeroOrder, ZOConfig


def zo_trainer(path: Path, model: str = "llama", cls: type[Any] = ZOTrainer, **settings: Any) -> Any:
    """A trainer on `texts`; what is no argument of the trainer is a training argument."""
    names = ("zo_config", "callbacks", "compute_loss_func", "compute_metrics", "eval_dataset", "optimizers")
    own = {name: settings.pop(name) for name in names if name in settings}
    own = {"model": tiny(model), "train_dataset": texts(), **own}
    if "optimizers" in own:
        own["optimizers"] = own["optimizers"](own["model"])
    return cls(args=arguments(path, **settings), **own)


# Losses


def squared(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    wanted = F.one_hot(labels.clamp(min=0), outputs.logits.shape[-1]).float()
    return F.mse_loss(outputs.logits, wanted, reduction="sum") / num_items_in_batch


def test_compute_loss_func_is_the_loss(tmp_path: Path) -> None:
    trainer, bare = zo_trainer(tmp_path, compute_loss_func=squared), tiny("llama")
    trainer.train()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        labels, count = batch.pop("labels"), batch.pop("num_items_in_batch")
        return squared(model(**batch), labels, count)

    bare_loop(bare, trainer.args, texts(), loss)
    assert not differing(weights(trainer.model), weights(bare))


def test_label_smoothing_is_part_of_the_loss(tmp_path: Path) -> None:
    trainer, bare = zo_trainer(tmp_path, label_smoothing_factor=0.3), tiny("llama")
    trainer.train()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        labels, count = batch.pop("labels"), batch.pop("num_items_in_batch")
        return LabelSmoother(0.3)(model(**batch), labels, shift_labels=True, num_items_in_batch=count)

    bare_loop(bare, trainer.args, texts(), loss)
    assert not differing(weights(trainer.model), weights(bare))


class Popping(ZOTrainer):
    """Takes its inputs apart and writes into them, as some trainers do."""

    keys: list[list[str]]

    def compute_loss(self, model: nn.Module, inputs: Batch, **_: Any) -> Tensor:
        self.keys.append(sorted(inputs))
        labels = inputs.pop("labels")
        inputs["use_cache"] = False
        return F.cross_entropy(model(**inputs).logits.flatten(0, 1), labels.flatten())


def test_a_loss_may_take_its_inputs_apart_because_each_probe_has_its_own(tmp_path: Path) -> None:
    trainer, bare = zo_trainer(tmp_path, cls=Popping), tiny("llama")
    trainer.keys = []
    trainer.train()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(input_ids=batch["input_ids"]).logits.flatten(0, 1), batch["labels"].flatten())

    bare_loop(bare, trainer.args, texts(), loss)
    assert trainer.keys == [["input_ids", "labels"]] * 8
    assert not differing(weights(trainer.model), weights(bare))


class Preparing(Trainer):
    """Counts its calls, and prepares a second batch of its own on the way to the loss."""

    prepared: list[Any]

    def _prepare_inputs(self, inputs: Any) -> Any:
        self.prepared.append(inputs)
        return super()._prepare_inputs(inputs)

    def compute_loss(self, model: nn.Module, inputs: Batch, **kwargs: Any) -> Tensor:
        other = self._prepare_inputs({"other": torch.ones(1)})
        assert list(other) == ["other"]
        return super().compute_loss(model, inputs, **kwargs)


class ZOPreparing(ZOTrainerMixin, Preparing):
    pass


def test_a_batch_is_prepared_once_for_all_probes_and_left_as_it_came(tmp_path: Path) -> None:
    trainer = zo_trainer(tmp_path, cls=ZOPreparing, gradient_accumulation_steps=2, label_smoothing_factor=0.1)
    trainer.prepared = []
    trainer.train()
    of_the_loader = [inputs for inputs in trainer.prepared if "other" not in inputs]
    assert len(of_the_loader) == 4
    assert all(sorted(inputs) == ["input_ids", "labels"] for inputs in of_the_loader)


# Leaving no trace


class Spying(ZOTrainer):
    """Notes the modes that each forward finds, and the state of the random generator around each step."""

    modes: list[tuple[bool, set[bool]]]
    draws: list[bool]

    def compute_loss(self, model: nn.Module, inputs: Batch, **kwargs: Any) -> Tensor:
        root, *others = model.modules()
        self.modes.append((root.training, {module.training for module in others}))
        return super().compute_loss(model, inputs, **kwargs)

    def training_step(self, *args: Any) -> Tensor:
        before = torch.get_rng_state()
        loss = super().training_step(*args)
        self.draws.append(not torch.equal(before, torch.get_rng_state()))
        assert all(module.training for module in self.model.modules())
        assert "backward" not in vars(self.accelerator)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in self.model.modules())
        assert not loss.requires_grad
        return loss


@pytest.mark.parametrize("dropout", [False, True])
def test_only_the_root_trains_during_a_probe_and_everything_after_it(tmp_path: Path, dropout: bool) -> None:
    trainer = zo_trainer(tmp_path, "bert", Spying, zo_config=ZOConfig(dropout=dropout))
    trainer.modes, trainer.draws = [], []
    trainer.train()
    assert trainer.modes == [(True, {dropout})] * 8
    assert trainer.draws == [dropout] * 4
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_with_dropout_a_step_draws_what_one_forward_draws(tmp_path: Path) -> None:
    trainer = zo_trainer(tmp_path, "bert", zo_config=ZOConfig(dropout=True), max_steps=1)
    trainer.train()
    batch = batches(tiny("bert"), trainer.args, texts())[0][0]
    torch.manual_seed(0)
    trainer.training_step(trainer.model, batch)
    drawn = torch.rand(4)
    torch.manual_seed(0)
    tiny("bert")(**batch)
    assert torch.equal(drawn, torch.rand(4))


class Failing(ZOTrainer):
    def compute_loss(self, model: nn.Module, inputs: Batch, **kwargs: Any) -> Tensor:
        super().compute_loss(model, inputs, **kwargs)
        raise KeyError("the loss failed")


def test_an_exception_in_the_loss_comes_out_and_leaves_no_trace(tmp_path: Path) -> None:
    trainer = zo_trainer(tmp_path, cls=Failing)
    with pytest.raises(KeyError, match="the loss failed"):
        trainer.train()
    assert not differing(weights(trainer.model), weights(tiny("llama")))
    assert all(module.training for module in trainer.model.modules())
    assert "backward" not in vars(trainer.accelerator)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trainer.model.modules())


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
    whole.train()
    assert logged(interrupted, "projected_grad") == logged(whole, "projected_grad")


# Callbacks, evaluation, checkpoints


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
    assert events[ZOTrainer].rates == events[Trainer].rates == [1e-6, 7.5e-7, 5e-7, 2.5e-7]


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
    trainer.zo_records = []
    trainer.add_callback(type("Listen", (TrainerCallback,), {"on_train_begin": lambda *a, **k: trainer.zo.listeners
                              .append(trainer.zo_records.append)}))  # fmt: skip
    trainer.train()
    first, second, _ = trainer.state.log_history
    assert set(first) == {"loss", "learning_rate", "projected_grad", "zo_clip_rate", "epoch", "step"}
    for entry, records in ((first, trainer.zo_records[:2]), (second, trainer.zo_records[2:])):
        mean_square = sum(record.projected_grad**2 for record in records) / 2
        assert entry["projected_grad"] == pytest.approx(math.sqrt(mean_square), rel=1e-12)
        assert entry["zo_clip_rate"] == sum(record.clipped for record in records) / 4
    assert first["zo_clip_rate"] + second["zo_clip_rate"] > 0


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


# Optimizers


def test_a_torch_optimizer_and_scheduler_that_are_passed_do_the_update(tmp_path: Path) -> None:
    def pair(model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=3)

    trainer, bare = zo_trainer(tmp_path, optimizers=pair), tiny("llama")
    trainer.train()
    optimizer, scheduler = pair(bare)
    zo = ZeroOrder(bare, optimizer=optimizer, seed=42)
    records = run(zo, batches(bare, trainer.args, texts()), scheduler)
    assert not differing(weights(trainer.model), weights(bare))
    assert [record.lr for record in records] == pytest.approx([1e-5 / 3, 5e-5 / 9, 7e-5 / 9, 1e-5])


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_rule_torch_takes_the_optimizer_that_the_arguments_name(tmp_path: Path, optim: str) -> None:
    trainer = zo_trainer(tmp_path, optim=optim, weight_decay=0.1, zo_config=ZOConfig(rule="torch"))
    trainer.train()
    bare = tiny("llama")
    cls, settings = Trainer.get_optimizer_cls_and_kwargs(trainer.args)
    zo = ZeroOrder(bare, optimizer=cls(groups(bare, trainer.args), **settings), seed=42)
    run(zo, batches(bare, trainer.args, texts()), torch.optim.lr_scheduler.ConstantLR(zo.optimizer, factor=1.0))
    assert not differing(weights(trainer.model), weights(bare))
    assert differing(weights(bare), weights(tiny("llama")))


def test_a_run_with_adamw_resumes_bit_for_bit(tmp_path: Path) -> None:
    settings = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "linear"}
    runs = []
    for resume in (None, str(tmp_path / "out" / "checkpoint-3")):
        trainer = zo_trainer(tmp_path, zo_config=ZOConfig(rule="torch"), **settings)
        trainer.train(resume_from_checkpoint=resume)
        runs.append(weights(trainer.model))
    assert not differing(*runs)


def test_a_fresh_optimizer_serves_each_model_of_a_hyperparameter_search(tmp_path: Path) -> None:
    used: list[tuple[float, float]] = []

    class Note(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            used.append((optimizer.param_groups[0]["lr"], trainer.zo.eps))

    args = arguments(tmp_path, ZOTrainingArguments, eval_strategy="epoch", max_steps=1)
    trainer = ZOTrainer(
        model_init=lambda: tiny("llama"), args=args, train_dataset=texts(), eval_dataset=texts(4), callbacks=[Note()]
    )
    space = {"learning_rate": [1e-6, 2e-6], "zo_eps": [1e-2]}
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    best = trainer.hyperparameter_search(
        lambda trial: {name: trial.suggest_categorical(name, values) for name, values in space.items()},
        n_trials=2, backend="optuna", sampler=optuna.samplers.GridSampler(space, seed=0),
    )  # fmt: skip
    assert sorted(used) == [(1e-6, 1e-2), (2e-6, 1e-2)]
    assert best.hyperparameters["learning_rate"] in space["learning_rate"]


class OutOfMemory(ZOTrainer):
    """Memory lasts for one probe with all 16 rows."""

    calls = 0

    def compute_loss(self, model: nn.Module, inputs: Batch, **kwargs: Any) -> Tensor:
        self.calls += 1
        if len(inputs["input_ids"]) == 16 and self.calls == 2:
            raise RuntimeError("CUDA out of memory.")
        return super().compute_loss(model, inputs, **kwargs)


def test_auto_find_batch_size_starts_again_with_fewer_rows_from_untouched_weights(tmp_path: Path) -> None:
    trainer = zo_trainer(tmp_path, cls=OutOfMemory, auto_find_batch_size=True, per_device_train_batch_size=16)
    trainer.train()
    assert trainer._train_batch_size == 14
    fewer = zo_trainer(tmp_path, per_device_train_batch_size=14)
    fewer.train()
    assert logged(trainer, "projected_grad") == logged(fewer, "projected_grad")
    assert not differing(weights(trainer.model), weights(fewer.model))


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
    assert (args.learning_rate, args.lr_scheduler_type, args.max_grad_norm) == (1e-4, "constant", 0.0)
    (plain,) = HfArgumentParser(ZOTrainingArguments).parse_args_into_dataclasses(["--output_dir", str(tmp_path)])
    assert plain.to_zo_config() == ZOConfig()
