"""Law: what cannot work is an error at once, what means something else here is said once, and the rest is silent."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import CHECKPOINTING, adapted, arguments, differing, logged, texts, weights
from models import tiny
from peft import LoraConfig
from processes import together
from torch import Tensor, nn
from transformers import HfArgumentParser, Trainer, TrainingArguments

from hf_zo import ZOArguments, ZOTrainer, ZOTrainerMixin, ZOTrainingArguments
from hf_zo.checks import check_processes
from zo_core import ConfigError, ModelError, ZOConfig


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Any:
    """A function that trains, and returns what was logged by this library."""
    caplog.set_level(logging.INFO)

    def train(args: TrainingArguments, model: nn.Module | None = None, **settings: Any) -> list[str]:
        caplog.clear()
        trainer = ZOTrainer(model=model or tiny("llama"), args=args, train_dataset=texts(), **settings)
        trainer.train()
        trainer.train()
        ours = [r for r in caplog.records if r.name.split(".")[0] in ("hf_zo", "zo_core")]
        return [r.getMessage() for r in ours if "seedlog" not in r.name]  # it says what it can't do: test_replay

    return train


WARNINGS: dict[str, tuple[dict[str, Any], str]] = {
    "learning rate": (
        {"learning_rate": 1e-6},
        "learning_rate=1e-06 is far below the rates that work for 17,568 weights with spsa, so hardly anything will be "
        "learnt; write one of 3e-04 to 3e-02, or pass ZOTrainingArguments without one",
    ),
    "checkpointing": (
        {CHECKPOINTING: True},
        "gradient_checkpointing=True has no use without a backward pass, and is switched off",
    ),
    "gradient clipping": (
        {"max_grad_norm": 0.5},
        "max_grad_norm=0.5 has no effect, there is no gradient to clip; zo_clip bounds the projected gradient",
    ),
    "neftune": (
        {"neftune_noise_alpha": 5.0},
        "neftune_noise_alpha=5 has no effect, probes run in eval mode; zo_dropout=True turns noise and dropout on",
    ),
    "fp16": (
        {"fp16": True},
        "fp16=True does nothing on a CPU, the run is in the model's own precision; use bf16=True",
    ),
}


@pytest.mark.parametrize(("changes", "message"), WARNINGS.values(), ids=WARNINGS.keys())
def test_a_setting_that_means_something_else_here_is_said_once(
    tmp_path: Path, said: Any, changes: dict[str, Any], message: str
) -> None:
    assert said(arguments(tmp_path, **changes)) == [message]


def test_adapters_have_a_range_of_their_own(tmp_path: Path, said: Any) -> None:
    config = LoraConfig(r=1, target_modules=["q_proj"])
    assert said(arguments(tmp_path, learning_rate=0.3), adapted(tiny("llama"), config)) == []
    (message,) = said(arguments(tmp_path, learning_rate=1e-5), adapted(tiny("llama"), config))
    assert "far below the rates that work for 128 weights" in message


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        ({"learning_rate": 2.0}, "learning_rate=2 is far above"),
        ({"zo_learning_rate": "2"}, "zo_learning_rate=2 is far above"),
        ({"zo_learning_rate": "1e-6"}, "zo_learning_rate=1e-06 is far below"),
        ({"zo_config": ZOConfig(lr=2.0)}, "lr=2 is far above"),
    ],
)
def test_the_line_has_the_names_of_the_arguments(
    tmp_path: Path, said: Any, settings: dict[str, Any], start: str
) -> None:
    own = {name: settings[name] for name in settings if name == "zo_config"}
    rest = {name: settings[name] for name in settings.keys() - own.keys()}
    messages = said(arguments(tmp_path, ZOTrainingArguments, **rest), **own)
    (message,) = [each for each in messages if "far" in each]
    assert message.startswith(start)
    assert message.endswith("write one of 3e-04 to 3e-02, or leave it out")


class HalfLoss(nn.Module):
    """Computes its loss in bfloat16, without any of torch's loss functions."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny("llama", dtype=torch.bfloat16)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": self.inner(input_ids).logits.square().mean()}


def test_a_loss_in_half_precision_is_said_once(tmp_path: Path, said: Any) -> None:
    (message,) = said(arguments(tmp_path), HalfLoss())
    assert message.startswith("the loss is torch.bfloat16")
    assert "compute it in float32" in message


SILENT: dict[str, dict[str, Any]] = {
    "sensible": {"learning_rate": 1e-3},
    "momentum": {"zo_config": ZOConfig(rule="momentum")},
    "fzoo": {"learning_rate": 1e-2, "zo_config": ZOConfig(estimator="fzoo", num_probes=2)},
    "sign": {"learning_rate": 5e-5, "zo_config": ZOConfig(rule="sign")},
    "adamw": {"learning_rate": 5e-5, "zo_config": ZOConfig(rule="torch")},
    "no clipping": {"max_grad_norm": 0.0},
    "bf16": {"bf16": True},
    "neftune with dropout": {"neftune_noise_alpha": 5.0, "zo_config": ZOConfig(dropout=True)},
}


@pytest.mark.parametrize("changes", SILENT.values(), ids=SILENT.keys())
def test_sensible_settings_are_silent(tmp_path: Path, said: Any, changes: dict[str, Any]) -> None:
    config = changes.get("zo_config")
    assert said(arguments(tmp_path, **{k: v for k, v in changes.items() if k != "zo_config"}), zo_config=config) == []


def test_of_the_defaults_only_the_rate_that_was_left_out_is_mentioned(tmp_path: Path, said: Any) -> None:
    settings = {name: getattr(ZOTrainingArguments, name) for name in ("max_grad_norm", "learning_rate")}
    (message,) = said(arguments(tmp_path, ZOTrainingArguments, **settings))
    assert message.startswith("no learning rate was given")


@dataclass
class Theirs(TrainingArguments):
    """Arguments of a trainer with other defaults, such as TRL's."""

    gradient_checkpointing: bool = True
    max_grad_norm: float = 0.3


def test_a_default_that_nobody_chose_is_not_held_against_the_user(tmp_path: Path, said: Any) -> None:
    renamed = CHECKPOINTING != "gradient_checkpointing"
    with pytest.warns(FutureWarning, match="gradient_checkpointing") if renamed else nullcontext():
        args = arguments(tmp_path, Theirs)
    model = tiny("llama")
    assert said(args, model) == []
    assert not getattr(args, CHECKPOINTING)
    assert not getattr(model, f"is_{CHECKPOINTING}")


def test_checkpointing_is_off_and_nan_is_logged_as_it_is(tmp_path: Path) -> None:
    args = arguments(tmp_path, **{CHECKPOINTING: True}, logging_nan_inf_filter=True)
    trainer = ZOTrainer(model=tiny("llama"), args=args, train_dataset=texts())
    trainer.train()
    assert not getattr(trainer.model, f"is_{CHECKPOINTING}")
    assert not args.logging_nan_inf_filter


class Scaling(Trainer):
    """Has the scaler that fp16 brings on CUDA, which insists on gradients."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu")


class ZOScaling(ZOTrainerMixin, Scaling):
    pass


def test_no_gradient_scaler_comes_between_the_losses_and_the_update(tmp_path: Path) -> None:
    runs = [cls(tiny("llama"), arguments(tmp_path), train_dataset=texts()) for cls in (ZOScaling, ZOTrainer)]
    for trainer in runs:
        trainer.train()
    assert not differing(weights(runs[0].model), weights(runs[1].model))


def test_fp16_on_a_cpu_trains_in_the_models_own_precision(tmp_path: Path) -> None:
    runs = [ZOTrainer(tiny("llama"), arguments(tmp_path, fp16=fp16), train_dataset=texts()) for fp16 in (True, False)]
    for trainer in runs:
        trainer.train()
    assert not differing(weights(runs[0].model), weights(runs[1].model))


# Errors


@dataclass
class Joined(ZOArguments, TrainingArguments):
    pass


def test_one_process_with_several_devices_trains_on_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = arguments(tmp_path)
    args._n_gpu = 3
    ZOTrainer(tiny("llama"), args)
    assert args.n_gpu == 1
    assert [line for line in caplog.messages if "sees 3 GPUs" in line and "--nproc_per_node 3" in line]


def test_processes_that_trainer_does_not_know_of_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=2: .* write use_cpu=True, or zo_ranks=None"):
        ZOTrainer(tiny("llama"), args)
    ZOTrainer(tiny("llama"), args, zo_config=ZOConfig(ranks=None))


def test_a_model_of_dtensors_is_for_bare_loops(tmp_path: Path) -> None:
    args = arguments(tmp_path)

    def work(rank: int) -> str:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        model = parallelize_module(
            nn.Sequential(nn.Linear(4, 4)), init_device_mesh("cpu", (1,)), {"0": ColwiseParallel()}
        )
        with pytest.raises(ModelError, match=r"DTensors .* train it in a loop with zo_core.ZeroOrder"):
            ZOTrainer(model, args)
        return "refused"

    assert together(work, tmp_path / "processes", size=1) == ["refused"]


def test_points_need_the_seedable_sampler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(tmp_path, accelerator_config={"use_seedable_sampler": False})
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(ConfigError, match=r"use_seedable_sampler=False in accelerator_config: .* leave it out"):
        check_processes(args, "points")
    check_processes(args, "directions")


def test_settings_come_from_one_place(tmp_path: Path) -> None:
    args = arguments(tmp_path, ZOTrainingArguments, zo_eps=1e-2, zo_seed=1)
    with pytest.raises(ConfigError, match=r"came twice, in zo_config and in args \(zo_eps, zo_seed\)"):
        ZOTrainer(tiny("llama"), args, zo_config=ZOConfig(clip=1.0))
    untouched = arguments(tmp_path, ZOTrainingArguments)
    assert ZOTrainer(tiny("llama"), untouched, zo_config=ZOConfig(clip=1.0)).zo_config.clip == 1.0


@pytest.mark.parametrize("config", [{"eps": 1e-3}, "spsa", ZOConfig])
def test_zo_config_is_a_zo_config(tmp_path: Path, config: Any) -> None:
    with pytest.raises(ConfigError, match=r"must be a ZOConfig, for example ZOConfig\(eps=1e-3\)"):
        ZOTrainer(tiny("llama"), arguments(tmp_path), zo_config=config)


def test_all_problems_of_the_arguments_come_at_once_under_their_names(tmp_path: Path) -> None:
    args = arguments(tmp_path, ZOTrainingArguments, zo_eps=-1.0, zo_noise="cauchy", zo_num_probes=0)
    with pytest.raises(ConfigError) as caught:
        ZOTrainer(tiny("llama"), args)
    assert [problem.split("=")[0] for problem in caught.value.problems] == ["zo_noise", "zo_eps", "zo_num_probes"]


@pytest.mark.parametrize("cls", [ZOTrainingArguments, Joined])
def test_auto_as_the_learning_rate_says_which_argument_takes_it(tmp_path: Path, cls: Any) -> None:
    with pytest.raises(ConfigError, match="learning_rate='auto' must be a number; write zo_learning_rate='auto'"):
        arguments(tmp_path, cls, learning_rate="auto")


@pytest.mark.parametrize("text", ["1e-3", "0.001", "auto"])
def test_a_learning_rate_may_be_text_as_command_lines_have_it(tmp_path: Path, text: str) -> None:
    line = ["--output_dir", str(tmp_path), "--zo_learning_rate", text]
    (args,) = HfArgumentParser(ZOTrainingArguments).parse_args_into_dataclasses(line)
    assert args.to_zo_config() == ZOConfig(lr=text if text == "auto" else 1e-3)
    with pytest.raises(ConfigError, match="zo_learning_rate='fast' must be a number of at least 0, for example 1e-6"):
        arguments(tmp_path, ZOTrainingArguments, zo_learning_rate="fast").to_zo_config()


def test_a_learning_rate_from_a_command_line_trains(tmp_path: Path) -> None:
    args = arguments(tmp_path, ZOTrainingArguments, zo_learning_rate="2e-3")
    trainer = ZOTrainer(tiny("llama"), args, train_dataset=texts())
    trainer.train()
    assert logged(trainer, "zo_lr") == logged(trainer, "learning_rate") == [2e-3] * 4


def test_a_model_without_trainable_parameters_says_what_to_do(tmp_path: Path) -> None:
    trainer = ZOTrainer(tiny("llama").requires_grad_(False), arguments(tmp_path), train_dataset=texts())
    with pytest.raises(ModelError, match=r"requires_grad_\(True\)"):
        trainer.train()


def test_a_rule_that_would_ignore_the_optimizer_that_was_passed_is_an_error(tmp_path: Path) -> None:
    model = tiny("llama")
    pair = (torch.optim.SGD(model.parameters(), lr=1e-6), None)
    config = ZOConfig(rule="momentum")
    trainer = ZOTrainer(model, arguments(tmp_path), train_dataset=texts(), optimizers=pair, zo_config=config)
    with pytest.raises(ConfigError, match="would ignore it"):
        trainer.train()


def test_zo_arguments_join_other_arguments(tmp_path: Path) -> None:
    trainer = ZOTrainer(tiny("llama"), arguments(tmp_path, Joined, zo_clip=3.0))
    assert trainer.zo_config == ZOConfig(clip=3.0)


# torch.compile


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_model_trains_to_the_same_weights_and_says_what_it_costs(
    tmp_path: Path, said: Any, dtype: torch.dtype
) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, eager = tiny("llama", dtype=dtype), tiny("llama", dtype=dtype)
    args = arguments(tmp_path, torch_compile=True, torch_compile_backend="eager", max_steps=2)
    (message,) = said(args, model)
    assert message.startswith("torch_compile=True: each probe copies all trained weights at once")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    said(arguments(tmp_path, max_steps=2), eager)
    assert not differing(weights(model), weights(eager))
    assert differing(weights(model), weights(tiny("llama", dtype=dtype)))


class NanFirst(ZOTrainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("nan") if self.state.global_step == 0 else loss


def test_a_compiled_model_survives_a_nan_in_its_first_step(tmp_path: Path) -> None:
    torch._dynamo.reset()
    runs = []
    for settings in ({"torch_compile": True, "torch_compile_backend": "eager"}, {}):
        trainer = NanFirst(tiny("llama"), arguments(tmp_path, max_steps=2, **settings), train_dataset=texts())
        trainer.train()
        runs.append(trainer)
    assert logged(runs[0], "projected_grad")[1] == logged(runs[1], "projected_grad")[1]
    assert not differing(weights(runs[0].model), weights(runs[1].model))
