"""Law: a loss whose value is not what it optimises is refused when the trainer is made, with what to write instead."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from hf_helpers import arguments, zo_trainer
from models import tiny
from torch import nn
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl_helpers import ROWS

from hf_zo import ZOTrainerMixin
from hf_zo.known_losses import check_loss
from zo_core import ConfigError, ZOConfig

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ARGS = {"gradient_accumulation_steps": 1, "steps_per_generation": 1, "num_iterations": 1}
GRPO = {"num_iterations": 1, "loss_type": "dapo", "top_entropy_quantile": 1.0, "epsilon_high": 0.2, "use_vllm": False}
DISTILLING = {"distillation_mode": "full_logits", "distillation_is_clip": None, "teacher_model_kind": "base"}


def trainer(name: str, *, base: type = object, loss: Any = None, args: Any = None, **settings: Any) -> Any:
    """Stands in for a subclass of a trainer with this name."""
    subclass = type("Own", (type(name, (base,), {}),), {})
    made = subclass()
    vars(made).update(settings, loss=loss, args=SimpleNamespace(**{**ARGS, **settings, **(args or {})}))
    made.zo_config = settings.get("zo_config", ZOConfig())
    return made


def module(name: str, inside: nn.Module | None = None, **settings: Any) -> nn.Module:
    """Stands in for a loss with this name."""
    made = type(name, (nn.Module,), {})()
    vars(made).update(settings)
    if inside is not None:
        made.add_module("loss", inside)
    return made


def grpo(name: str = "GRPOTrainer", **settings: Any) -> Any:
    return trainer(name, **{**GRPO, **settings})


def self_distillation(name: str, **settings: Any) -> Any:
    return trainer(name, **{"num_iterations": 1, "distillation_weight": 1.0, **DISTILLING, **settings})


REFUSED = {
    "ratio": (lambda: grpo(), "num_iterations=2"),
    "ratio, with a reference": (lambda: grpo(beta=0.1), "num_iterations=2"),
    "ratio of sequences": (lambda: grpo(loss_type="sapo"), "num_iterations=2"),
    "generated once for several": (
        lambda: grpo(args={"gradient_accumulation_steps": 4, "steps_per_generation": 4}),
        "2",
    ),
    "geometric mean": (lambda: grpo("GMPOTrainer", loss_type="cispo"), "num_iterations=2"),
    "cispo, reused": (lambda: grpo(loss_type="cispo", epsilon_high=5.0, num_iterations=2), "num_iterations=1"),
    "vespo, reused": (lambda: grpo(loss_type="vespo", num_iterations=2), "num_iterations=1"),
    "entropy": (lambda: grpo(num_iterations=2, top_entropy_quantile=0.5), "top_entropy_quantile=1.0"),
    "dft": (lambda: trainer("SFTTrainer", loss_type="dft", compute_loss_func=None), "loss_type='nll'"),
    "weighting": (lambda: trainer("DPOTrainer", use_weighting=True), "use_weighting=False"),
    "online": (lambda: trainer("OnlineDPOTrainer"), "RLOOTrainer"),
    "gkd": (lambda: trainer("GKDTrainer", lmbda=0.5), "lmbda=0.0"),
    "iw_opd": (lambda: trainer("IWOPDTrainer", distillation_objective="iw_opd", use_vllm=False), "'jsd'"),
    "sampled": (lambda: self_distillation("SDFTTrainer", distillation_mode="sampled_token"), "'full_logits'"),
    "clip": (
        lambda: self_distillation("SDPOTrainer", distillation_is_clip=2.0, num_iterations=2),
        "distillation_is_clip=None",
    ),
    "live": (lambda: self_distillation("SDFTTrainer", teacher_model_kind="live"), "teacher_model_kind='base'"),
    "part of the ratio": (lambda: self_distillation("SDPOTrainer", distillation_weight=0.5), "distillation_weight=1.0"),
    "hard negatives": (lambda: st(module("Ranking", hardness_mode="all_negatives", hardness_strength=9.0)), "None"),
    "in a loss in a dict": (
        lambda: st({"a": module("MatryoshkaLoss", module("Any", hardness_mode="x", hardness_strength=1.0))}),
        "hardness_mode=None",
    ),
    "layers": (lambda: st(module("AdaptiveLayerLoss", kl_temperature=0.3, kl_div_weight=1.0)), "kl_temperature=0"),
    "codes": (lambda: st(module("CSRLoss", module("CSRReconstructionLoss", beta=0.1))), "beta=0.0"),
    "streamed": (
        lambda: st(module("AdaptiveLayerLoss", kl_temperature=0), zo_config=ZOConfig(offload="cpu")),
        "leave out offload",
    ),
}
ALLOWED = {
    "kept": lambda: grpo(num_iterations=2),
    "kept for later steps": lambda: grpo(args={"steps_per_generation": 2}),
    "kept for another engine": lambda: grpo(use_vllm=True, vllm_importance_sampling_correction=True),
    "cispo": lambda: grpo(loss_type="cispo", epsilon_high=5.0),
    "vespo": lambda: grpo(loss_type="vespo"),
    "geometric mean": lambda: grpo("GMPOTrainer", num_iterations=2),
    "nll": lambda: trainer("SFTTrainer", loss_type="nll", compute_loss_func=None),
    "own loss": lambda: trainer("SFTTrainer", loss_type="dft", compute_loss_func=print),
    "pairs": lambda: trainer("DPOTrainer", use_weighting=False),
    "gkd": lambda: trainer("GKDTrainer", lmbda=0.0),
    "jsd": lambda: trainer("IWOPDTrainer", distillation_objective="jsd", use_vllm=False),
    "distilling": lambda: self_distillation("SDFTTrainer"),
    "distilling, reused": lambda: self_distillation("SDPOTrainer", num_iterations=2),
    "ranking": lambda: st(module("Ranking", hardness_mode=None, hardness_strength=9.0)),
    "layers": lambda: st(module("AdaptiveLayerLoss", kl_temperature=0.0, kl_div_weight=1.0)),
    "streamed": lambda: st(module("MatryoshkaLoss"), zo_config=ZOConfig(offload="cpu")),
    "another trainer": lambda: trainer("Trainer"),
    "another version, without the settings": lambda: trainer("GRPOTrainer"),
}


def st(loss: Any, **settings: Any) -> Any:
    return trainer("SentenceTransformerTrainer", loss=loss, **settings)


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_the_way_out(name: str) -> None:
    make, way_out = REFUSED[name]
    with pytest.raises(ConfigError, match=way_out):
        check_loss(make())


@pytest.mark.parametrize("name", ALLOWED)
def test_the_way_out_and_others_pass_in_silence(name: str, caplog: pytest.LogCaptureFixture) -> None:
    check_loss(ALLOWED[name]())
    assert not caplog.records


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: trainer("KTOTrainer", loss_type="kto", calculate_KL=True), "apo_zero_unpaired"),
        (lambda: self_distillation("SDFTTrainer", distillation_mode="topk_logits"), "zo_clip"),
        (lambda: st(module("LambdaLoss")), "zo_clip"),
    ],
)
def test_small_terms_are_warned_of(make: Any, said: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hf_zo"):
        check_loss(make())
    (record,) = caplog.records
    assert said in record.getMessage()


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        check_loss(grpo(top_entropy_quantile=0.5))
    assert len(caught.value.problems) == 2


class ZOSFT(ZOTrainerMixin, SFTTrainer):
    pass


class ZOGRPO(ZOTrainerMixin, GRPOTrainer):
    pass


def test_the_trainers_of_trl_are_known(tmp_path: Path, tokenizer: Any) -> None:
    parts = {"model": tiny("llama", tied=False), "processing_class": tokenizer}
    text, prompts = (Dataset.from_dict({column: ROWS}) for column in ("text", "prompt"))
    with pytest.raises(ConfigError, match="loss_type='dft'"):
        ZOSFT(
            args=arguments(tmp_path, SFTConfig, loss_type="dft", activation_checkpointing=False),
            train_dataset=text,
            **parts,
        )
    settings = {"num_generations": 4, "activation_checkpointing": False}
    with pytest.raises(ConfigError, match="num_iterations=1"):
        ZOGRPO(args=arguments(tmp_path, GRPOConfig, **settings), reward_funcs=len, train_dataset=prompts, **parts)
    ZOGRPO(
        args=arguments(tmp_path, GRPOConfig, num_iterations=2, **settings),
        reward_funcs=len,
        train_dataset=prompts,
        **parts,
    )


def test_the_plain_trainer_passes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    zo_trainer(tmp_path)
    assert not caplog.records
