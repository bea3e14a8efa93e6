"""Law: reward functions see what the installed `GRPOTrainer` shows them, and logs have its names for the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hf_helpers import CHECKPOINTING, arguments
from models import tiny
from reward_helpers import PROMPTS, reward_trainer, words
from trl import GRPOConfig, GRPOTrainer

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
