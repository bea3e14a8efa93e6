"""Every trainer of TRL that runs without a server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trl
from peft import LoraConfig
from trl.experimental.a2po import A2POConfig, A2POTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer
from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.sdft import SDFTConfig, SDFTTrainer
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer

from .hugging_face import Case
from .models import arguments, judge, letters, llama, rows, text, tokenizer

DPO_LOSSES = (
    "sigmoid", "hinge", "ipo", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
GRPO_LOSSES = ("dapo", "grpo", "bnpo", "dr_grpo", "luspo", "sapo", "vespo")


PREFERENCES = {
    "prompt": lambda i: text(i, 3),
    "chosen": lambda i: " " + text(i + 1, 4 + i % 2),
    "rejected": lambda i: " " + text(i + 2, 5),
}


def made(trainer: Any, config: type[Any], data: dict[str, Any], model: Callable[[], Any] = llama, **fixed: Any) -> Any:
    """A function that makes a trainer."""

    def case(setting: str = "", remark: str = "", own: dict[str, Any] | None = None, also: Any = None, **settings: Any):
        def make(wrap: Callable[[type], type], **zo: Any) -> Any:
            parts = {name: value() for name, value in {**fixed, **(own or {})}.items()}
            parts.setdefault("processing_class", tokenizer())
            args = arguments(config, **settings)
            return wrap(trainer)(model=model(), args=args, train_dataset=rows(**data), **parts, **zo)

        shown = setting or ", ".join(f"{name}={value!r}" for name, value in settings.items()) or "defaults"
        return Case(trainer.__name__, shown, make, remark, also)

    return case


def lora() -> LoraConfig:
    return LoraConfig(
        r=4, target_modules="all-linear", lora_dropout=0.0, init_lora_weights=False, task_type="CAUSAL_LM"
    )


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    """Words with even numbers are good."""
    return [float(sum(int(word[1:]) % 2 == 0 for word in c.split() if word[0] == "w")) for c in completions]


def teacher() -> Any:
    return llama(2)


#: Of the tokenizer that reads bytes.
LETTERS = 261
PROMPTS = {"prompt": lambda i: text(i, 3)}
UNPAIRED = {"prompt": lambda i: text(i, 3), "completion": lambda i: " " + text(i + 1, 5), "label": lambda i: i % 3 > 0}
CHATS = {
    "messages": lambda i: [
        {"role": "user", "content": text(i, 3)},
        {"role": "assistant", "content": text(i + 1, 4)},
    ]
}
TRIPLES = {**PREFERENCES, "reference": lambda i: " " + text(i + 3, 4)}
LEFT = {"processing_class": lambda: tokenizer("left")}
SAMPLED = {"max_completion_length": 6, "num_generations": 4}


def scored(trainer: Any, config: type[Any]) -> Any:
    """Trainers that generate and score."""

    def case(setting: str = "", remark: str = "", **settings: Any) -> Case:
        shown = setting or ", ".join(f"{name}={value!r}" for name, value in settings.items()) or "defaults"
        many = settings.pop("per_device_train_batch_size", 8)
        parts = {"reward_funcs": lambda: reward, **LEFT}
        make = made(trainer, config, PROMPTS, **parts)
        return make(shown, remark, per_device_train_batch_size=many, **SAMPLED, **settings)

    return case


sft = made(trl.SFTTrainer, trl.SFTConfig, {"text": lambda i: text(i, 4 + i % 5)})
dpo = made(trl.DPOTrainer, trl.DPOConfig, PREFERENCES, ref_model=lambda: llama(1))
kto = made(trl.KTOTrainer, trl.KTOConfig, UNPAIRED, ref_model=lambda: llama(1))
scores = made(trl.RewardTrainer, trl.RewardConfig, {k: v for k, v in PREFERENCES.items() if k != "prompt"}, model=judge)
grpo = scored(trl.GRPOTrainer, trl.GRPOConfig)
rloo = scored(trl.RLOOTrainer, trl.RLOOConfig)
gmpo = scored(GMPOTrainer, GMPOConfig)
distil = made(trl.DistillationTrainer, trl.DistillationConfig, PROMPTS, teacher_model=teacher, **LEFT)
cpo = made(CPOTrainer, CPOConfig, PREFERENCES)
orpo = made(ORPOTrainer, ORPOConfig, PREFERENCES)
tpo = made(TPOTrainer, TPOConfig, TRIPLES)
gkd = made(GKDTrainer, GKDConfig, CHATS, teacher_model=teacher, **LEFT)
gold = made(
    GOLDTrainer,
    GOLDConfig,
    CHATS,
    lambda: llama(0, LETTERS),
    teacher_model=lambda: llama(2, LETTERS),
    processing_class=letters,
)
iw_opd = made(IWOPDTrainer, IWOPDConfig, CHATS, teacher_model=teacher, **LEFT)
online_dpo = made(OnlineDPOTrainer, OnlineDPOConfig, PROMPTS, reward_funcs=lambda: reward, **LEFT)
a2po = made(A2POTrainer, A2POConfig, PROMPTS, reward_funcs=lambda: reward, **LEFT)
sdft = made(SDFTTrainer, SDFTConfig, {**PROMPTS, "privileged_context": lambda i: text(i + 5, 2)}, **LEFT)
sdpo = scored(SDPOTrainer, SDPOConfig)


CLIPPED = "With a large eps the ratio of a whole sequence leaves 1 ± epsilon and is clipped: look at `clip_ratio`."
ORDER = "Which tokens are the most probable changes in jumps, which a warning says."


def reference(trainer: Any) -> dict[str, Any]:
    return trainer.ref_model.state_dict()


CASES = [
    sft(),
    sft("LoRA", own={"peft_config": lora}),
    sft(packing=True, max_length=16),
    sft(loss_type="dft"),
    sft(label_smoothing_factor=0.1),
    *(dpo(loss_type=[kind]) for kind in DPO_LOSSES),
    dpo(loss_type=["exo_pair"], label_smoothing=1e-3),
    dpo(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5]),
    dpo(use_weighting=True),
    dpo("LoRA", own={"peft_config": lora, "ref_model": lambda: None}),
    dpo(sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=0.5, also=reference),
    kto(remark="Its KL term counts in the value, which a warning says."),
    kto(loss_type="apo_zero_unpaired"),
    scores(),
    scores(center_rewards_coefficient=0.01),
    grpo(),
    grpo(beta=0.1),
    *(grpo(num_iterations=2, loss_type=kind) for kind in GRPO_LOSSES),
    grpo(loss_type="cispo", epsilon_high=5.0),
    grpo(loss_type="cispo", epsilon_high=5.0, num_iterations=2),
    grpo(loss_type="vespo"),
    grpo(num_iterations=2, beta=0.1),
    grpo(num_iterations=2, importance_sampling_level="sequence"),
    grpo(num_iterations=2, top_entropy_quantile=0.5),
    grpo(num_iterations=2, entropy_coef=0.01),
    grpo(steps_per_generation=2),
    gmpo(),
    gmpo(num_iterations=2),
    rloo(remark=CLIPPED),
    rloo(num_iterations=2),
    distil(max_completion_length=6),
    distil(max_completion_length=6, beta=0.5),
    cpo(),
    cpo(loss_type="simpo", cpo_alpha=0.5),
    orpo(),
    tpo(),
    gkd(max_new_tokens=6),
    gkd(max_new_tokens=6, lmbda=0.0),
    gold(use_uld_loss=False, max_completion_length=6),
    gold(use_uld_loss=False, max_completion_length=6, lmbda=0.0),
    iw_opd(max_completion_length=6),
    iw_opd(max_completion_length=6, distillation_objective="jsd"),
    online_dpo(max_new_tokens=6),
    a2po(max_completion_length=6),
    sdft(**SAMPLED, distillation_topk=8, remark=ORDER),
    sdft(**SAMPLED, distillation_mode="full_logits"),
    sdft(**SAMPLED, distillation_mode="sampled_token", distillation_alpha=1.0),
    sdft(**SAMPLED, distillation_topk=8, num_iterations=2),
    sdft(**SAMPLED, distillation_topk=8, num_iterations=2, distillation_is_clip=None, remark=ORDER),
    sdpo(),
    sdpo(distillation_mode="full_logits"),
    sdpo(distillation_weight=0.5, distillation_mode="full_logits"),
    sdpo(distillation_weight=0.5, distillation_mode="full_logits", num_iterations=2, distillation_is_clip=None),
]
