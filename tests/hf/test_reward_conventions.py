"""Law: reward functions see what the installed `GRPOTrainer` shows them, and logs have its names for the results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hf_helpers import CHECKPOINTING, arguments
from models import tiny
from reward_helpers import PROMPTS, reward_trainer, words
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import parse_response

from hf_zo import ZORewardConfig, ZORewardTrainer
from hf_zo.completions import Completer

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w9{% endif %}"


def kind(value: Any) -> Any:
    """The types that a value is made of."""
    if isinstance(value, list):
        return [kind(value[0])]
    return {key: kind(each) for key, each in value.items()} if isinstance(value, dict) else type(value)


class Judge:
    """Notes what it is called with; its name in logs is that of a function."""

    def __init__(self, name: str, conversations: bool) -> None:
        self.calls: list[dict[str, Any]] = []
        self.__name__, self.conversations = name, conversations

    def __call__(self, **given: Any) -> list[float]:
        self.calls.append(given)
        texts = [each[0]["content"] for each in given["completions"]] if self.conversations else given["completions"]
        return words(texts)


def judges(conversations: bool) -> tuple[Judge, list[Any]]:
    """The function that is watched, and all of them: one is asynchronous, and one applies to some prompts only."""
    watched = Judge("watched", conversations)

    async def later(completions: list[Any], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    def sometimes(prompts: list[Any], **_: Any) -> list[float | None]:
        return [None if index % 2 else 0.5 for index in range(len(prompts))]

    return watched, [watched, later, sometimes]


#: As TRL and tokenizers have it: what a message is made of, by the text between its marks.
TEMPLATED = {
    "defaults": {"role": "assistant"},
    "start_anchor": "w9",
    "fields": {
        "reasoning_content": {"open": "w1", "close": "w2", "content": "text"},
        "content": {"close": "</s>", "content": "text"},
    },
}


def of_rewards(logs: list[dict[str, float]]) -> set[str]:
    """The names of what is logged about rewards and completions; lengths of completions that ended may be of none."""
    names = {name for entry in logs for name in entry if "terminated" not in name}
    return {name for name in names if name.startswith(("reward", "completions", "frac_reward"))}


@pytest.mark.parametrize("conversations", [False, True], ids=["texts", "conversations"])
def test_a_function_sees_and_logs_the_same_under_both_trainers(
    conversations: bool, tmp_path: Path, tokenizer: Any
) -> None:
    more = {"level": 3, "tags": ["a", "b"], "about": {"source": "here"}}
    rows = [{**row, **more} for row in PROMPTS]
    if conversations:
        rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    found, tokenizer.chat_template = [], TEMPLATE
    weights = [1.0, 0.5, 2.0]
    try:
        for ours in (True, False):
            watched, functions = judges(conversations)
            if ours:
                settings: dict[str, Any] = {"train_dataset": rows, "max_steps": 1, "reward_weights": weights}
                trainer = reward_trainer(tmp_path / "ours", tokenizer, functions, **settings)
            else:
                settings = {"num_generations": 4, "max_completion_length": 6, "max_steps": 1, CHECKPOINTING: False}
                trainer = GRPOTrainer(
                    tiny("llama", tied=False),
                    functions,
                    arguments(tmp_path / "theirs", GRPOConfig, reward_weights=weights, **settings),
                    train_dataset=Dataset.from_list(rows),
                    processing_class=tokenizer,
                )
            trainer.train()
            found.append((watched.calls[0], of_rewards(trainer.state.log_history)))
    finally:
        tokenizer.chat_template = None
    (mine, logged), (theirs, wanted) = found
    for given in (mine, theirs):
        assert callable(given.pop("log_metric"))
        assert callable(given.pop("log_extra"))
    assert kind(mine) == kind(theirs)
    assert wanted <= logged
    assert {f"rewards/{name}/mean" for name in ("watched", "later", "sometimes")} <= wanted


def test_a_response_is_parsed_as_the_tokenizer_says(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    monkeypatch.setattr(tokenizer, "response_template", TEMPLATED)
    prompts = [[{"role": "user", "content": "w5 w6"}], [{"role": "user", "content": "w5"}]]
    said = ["w1 w7 w2 w8 </s>", "w1 w7 </s>"]  # the second was cut off while it reasoned
    complete = Completer(tokenizer, ZORewardConfig("out", use_cpu=True))

    class Says(torch.nn.Module):
        def generate(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
            rows = tokenizer(said, return_tensors="pt", padding=True)["input_ids"]
            return torch.cat([input_ids, rows], 1)

    messages = [each.completions[0][0] for each in complete(Says(), prompts, 1, 0, 0)]
    for ids, mine, prompt in zip(said, messages, prompts, strict=True):
        asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        asked_ids = tokenizer(asked, add_special_tokens=False)["input_ids"]
        assert mine == parse_response(tokenizer, tokenizer(ids)["input_ids"], prefix=asked_ids)
    assert messages[0]["reasoning_content"].strip() == "w7"
    assert messages[0]["content"].strip() == "w8"
    assert messages[1]["content"] == ""

    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("not a response")

    monkeypatch.setattr(tokenizer, "parse_response", broken)
    assert complete(Says(), prompts, 1, 0, 0)[1].completions == [[{"role": "assistant", "content": "w1 w7"}]]


@pytest.mark.slow
def test_the_script_of_trl_runs_with_two_names_changed(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import trl
    from trl.scripts import grpo

    tiny("llama", tied=False).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)), encoding="utf-8")
    monkeypatch.setattr(trl, "GRPOTrainer", ZORewardTrainer)
    monkeypatch.setattr(trl, "GRPOConfig", ZORewardConfig)
    monkeypatch.setattr(sys, "path", list(sys.path))
    line = f"--model_name_or_path {tmp_path}/model --dtype float32 --dataset_name {tmp_path}/rows --use_peft"
    line += f" --reward_funcs reward_helpers.words --output_dir {tmp_path}/out --use_cpu --max_steps 1"
    line += " --max_completion_length 4 --zo_num_probes 2 --zo_eps 0.05 --report_to none"
    grpo.main(*grpo.make_parser().parse_args_and_config(line.split(), fail_with_unknown_args=False))
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
