"""Law: settings of `ZORewardTrainer` that would be ignored, or cannot work, are refused; the others count."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import tiny
from peft import LoraConfig, get_peft_model
from reward_helpers import reward_trainer, words
from transformers import BatchEncoding
from trl import GRPOConfig, GRPOTrainer

from hf_zo import ZORewardConfig, ZORewardTrainer
from hf_zo.completions import Completer
from hf_zo.grpo_names import INSTEAD
from zo_core import ConfigError, ZOConfig


def test_all_problems_with_the_arguments_are_listed(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"(?s)max_completion_length=0.*num_generations=4 with temperature=0"):
        reward_trainer(tmp_path, tokenizer, max_completion_length=0, num_generations=4)
    with pytest.raises(ConfigError, match="remove_unused_columns=True"):
        reward_trainer(tmp_path, tokenizer, remove_unused_columns=True)
    with pytest.raises(ConfigError, match="needs a column 'prompt'"):
        reward_trainer(tmp_path, tokenizer, train_dataset=[{"text": "w1"}])
    with pytest.raises(ConfigError, match=r"reward_weights=\[1.0\] must have 2 numbers"):
        reward_trainer(tmp_path, tokenizer, [words, words], reward_weights=[1.0])
    with pytest.raises(ConfigError, match="7 is no function"):
        reward_trainer(tmp_path, tokenizer, [words, 7])
    with pytest.raises(ConfigError, match="pass a ZORewardConfig"):
        ZORewardTrainer(tiny("llama"), words, ZOConfig())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="model_init_kwargs is for a model given by its name"):
        reward_trainer(tmp_path, tokenizer, model_init_kwargs={"dtype": "bfloat16"})
    with pytest.raises(ConfigError, match="accelerator_config: dispatch_batches=True would split"):
        reward_trainer(tmp_path, tokenizer, accelerator_config={"dispatch_batches": True})


TALK = {"prompt": [{"role": "user", "content": "w1"}]}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "w1"}, {"text": "w1"}], "{'text': 'w1'}; it needs a column 'prompt'"),
        ([{"prompt": []}], r"{'prompt': \[\]}; it needs a column 'prompt' with a text or a conversation"),
        ([{"prompt": "w1", "answer": 1}, {"prompt": "w2"}], r"{'prompt': 'w2'}; .* the columns \['prompt', 'answer'\]"),
        ([{"prompt": "w1"}, {"prompt": "w2", "answer": 1}], r"'answer': 1}; .* the columns \['prompt'\]"),
        ([{"prompt": "w1"}, TALK], r"\[{'role'.*; another of its batch has the prompt 'w1'"),
        ([{"prompt": "w1"}, {"prompt": ""}], "the prompt '' has no tokens; write at least one, for example '<s>'"),
        *(
            ([{"prompt": "w1", name: 3}], f"reward functions get something else as {name!r}; rename this column")
            for name in ("prompts", "completions", "trainer_state", "log_metric", "log_extra")
        ),
    ],
)
def test_rows_that_cannot_work_are_named_when_they_come(
    rows: list[dict[str, Any]], said: str, tmp_path: Path, tokenizer: Any
) -> None:
    with pytest.raises(ConfigError, match=said):
        reward_trainer(tmp_path, tokenizer).predict(rows)


GREEDY = r"num_generations=3 with temperature=0 .* write temperature=1.0, or num_generations=1"
NO_USE = "top_p, top_k and min_p have no effect with temperature=0; write temperature=1.0, or leave them out"


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"num_generations": 3}, GREEDY),
        ({"num_generations": 3, "generation_kwargs": {"num_beams": 2}}, GREEDY),
        ({"num_generations": 3, "generation_kwargs": {"do_sample": False}}, "num_generations=3 with do_sample=False"),
        (
            {"num_generations": 3, "temperature": 1.0, "generation_kwargs": {"do_sample": False}},
            "write temperature=1.0 without do_sample",
        ),
        ({"num_generations_eval": 3}, "num_generations_eval=3 with temperature=0 .* or num_generations_eval=1"),
        ({"top_p": 0.9}, NO_USE),
        ({"top_k": 5}, NO_USE),
        ({"min_p": 0.1}, NO_USE),
        (
            {"temperature": 1.0, "generation_kwargs": {"num_return_sequences": 2}},
            "generation_kwargs: num_return_sequences is not for completions here; write num_generations",
        ),
    ],
)
def test_generation_that_cannot_be_meant_is_refused(own: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ZORewardConfig("out", use_cpu=True, **own)


def test_sampling_settings_count_however_sampling_is_asked_for() -> None:
    own = {"top_p": 0.9, "top_k": 5, "min_p": 0.1, "num_generations": 3}
    asked = ZORewardConfig("out", use_cpu=True, generation_kwargs={"do_sample": True}, **own).generation_config()
    assert (asked.do_sample, asked.top_p, asked.top_k, asked.min_p) == (True, 0.9, 5, 0.1)
    warm = ZORewardConfig("out", use_cpu=True, temperature=0.5, **own).generation_config()
    assert (warm.do_sample, warm.temperature, warm.top_p, warm.top_k, warm.min_p) == (True, 0.5, 0.9, 5, 0.1)


@pytest.mark.parametrize("end", [7, [7, 9]])
def test_an_end_token_of_generation_kwargs_cuts_completions(tokenizer: Any, end: Any) -> None:
    args = ZORewardConfig("out", use_cpu=True, generation_kwargs={"eos_token_id": end})
    completer = Completer(tokenizer, args, [3])
    assert completer._until_end([3, 4, 7, 5]) == ([3, 4, 7], True)
    assert Completer(tokenizer, ZORewardConfig("out", use_cpu=True), [3])._until_end([4, 3, 7]) == ([4, 3], True)


def test_every_argument_that_only_grpo_has_says_what_to_write_instead() -> None:
    own = ZORewardConfig.__dataclass_fields__
    theirs = {each.name for each in fields(GRPOConfig)} | set(inspect.signature(GRPOTrainer.__init__).parameters)
    ours = {*own, *inspect.signature(ZORewardTrainer.__init__).parameters, *INSTEAD}
    assert theirs <= ours
    assert not set(INSTEAD) & set(own)
    with pytest.raises(ConfigError, match=r"(?s)beta=0.04: .*decay_to.*scale_rewards=False: .*'shaping': 'center'"):
        ZORewardConfig("out", use_cpu=True, beta=0.04, scale_rewards=False)


def test_an_argument_that_a_subclass_has_of_its_own_is_no_mistake() -> None:
    @dataclass
    class Mine(ZORewardConfig):
        beta: float = 0.1

    assert Mine("out", use_cpu=True, beta=0.2).beta == 0.2
    with pytest.raises(ConfigError, match=r"epsilon=0\.1: there is no loss of tokens"):
        Mine("out", use_cpu=True, epsilon=0.1)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"tools": [len]}, "tools=.*not supported"),
        ({"rollout_func": len}, "rollout_func=.*generation_kwargs"),
        ({"environment_factory": len}, "environment_factory=.*not supported"),
        ({"quantization_config": object()}, "quantization_config is for a model given by its name"),
    ],
)
def test_an_argument_of_the_trainer_that_cannot_work_is_named(
    own: dict[str, Any], said: str, tmp_path: Path, tokenizer: Any
) -> None:
    with pytest.raises(ConfigError, match=said):
        reward_trainer(tmp_path, tokenizer, **own)


def test_adapters_are_not_added_to_adapters(tmp_path: Path, tokenizer: Any) -> None:
    config = LoraConfig(task_type="CAUSAL_LM")
    adapted = get_peft_model(tiny("llama", tied=False), config)
    with pytest.raises(ConfigError, match="peft_config: the model has adapters already"):
        reward_trainer(tmp_path, tokenizer, model=adapted, peft_config=config)


def test_a_model_card_has_the_name_of_the_data_set(tmp_path: Path, tokenizer: Any) -> None:
    trainer = reward_trainer(tmp_path, tokenizer)
    trainer.create_model_card(model_name="mine", dataset_name="someone/rows")
    assert "someone/rows" in Path(trainer.args.output_dir, "README.md").read_text(encoding="utf-8")


def test_a_config_with_its_own_defaults_is_noticed(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    own = {"zo_eps": None, "zo_num_probes": None}
    reward_trainer(tmp_path, tokenizer, zo_config=ZOConfig(estimator="es", num_probes=4), **own)
    assert "zo_config has" not in caplog.text
    reward_trainer(tmp_path, tokenizer, zo_config=ZOConfig(num_probes=4), **own)
    assert caplog.text.count("zo_config has estimator='spsa'") == 1


def test_a_command_line_has_dicts_in_json() -> None:
    args = ZORewardConfig("out", generation_kwargs='{"num_beams": 2}', use_cpu=True)
    assert args.generation_config().num_beams == 2
    with pytest.raises(ConfigError, match="generation_kwargs='two' must be a dict"):
        ZORewardConfig("out", generation_kwargs="two", use_cpu=True)


def test_a_name_is_loaded_with_the_given_arguments(tmp_path: Path, tokenizer: Any) -> None:
    tiny("llama", tied=False).save_pretrained(tmp_path / "model")
    given = {"model": str(tmp_path / "model"), "model_init_kwargs": '{"dtype": "bfloat16"}'}
    assert reward_trainer(tmp_path, tokenizer, **given).model.dtype == torch.bfloat16


def test_a_name_is_loaded_as_grpo_scripts_ask_for_it(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def loaded(name: str, **given: Any) -> Any:
        asked.update(given)
        return tiny("llama", tied=False)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loaded)
    reward_trainer(tmp_path, tokenizer, model="someone/model", quantization_config="how", trust_remote_code=True)
    assert asked == {"quantization_config": "how", "trust_remote_code": True}
    own = {"model_init_kwargs": {"quantization_config": "how"}, "quantization_config": "how"}
    with pytest.raises(ConfigError, match="quantization_config is for a model given by its name, and not in"):
        reward_trainer(tmp_path, tokenizer, model="someone/model", **own)


def test_a_reward_model_has_the_arguments_of_its_name(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    class Judge(torch.nn.Module):
        device = torch.device("cpu")
        config = type("config", (), {"name_or_path": "someone/judge", "pad_token_id": None})

        def forward(self, **inputs: Any) -> Any:
            return type("Output", (), {"logits": torch.tensor([[0.5]])})

    class Tokens:
        pad_token, pad_token_id = "<pad>", 0

        def apply_chat_template(self, messages: Any, **own: Any) -> str:
            asked.append(("template", own))
            return "text"

        def __call__(self, texts: list[str], **own: Any) -> Any:
            return BatchEncoding({})

    def load(made: Any) -> Any:
        def from_pretrained(name: str, **own: Any) -> Any:
            asked.append((name, own))
            return made()

        return from_pretrained

    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", load(Judge))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", load(Tokens))
    given = {
        "model_init_kwargs": {"dtype": "bfloat16", "revision": "v2"},
        "chat_template_kwargs": {"enable_thinking": False},
    }
    trainer = reward_trainer(tmp_path, tokenizer, "someone/judge", **given)
    message = [{"role": "user", "content": "w1"}]
    assert trainer.rewards({"prompts": [message], "completions": [message]}) == [[0.5]]
    assert asked == [
        ("someone/judge", {"num_labels": 1, "dtype": "bfloat16", "revision": "v2"}),
        ("someone/judge", {"revision": "v2"}),
        ("template", {"tokenize": False, "enable_thinking": False}),
    ]
