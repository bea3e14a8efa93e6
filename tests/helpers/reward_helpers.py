"""A tiny language model, prompts and rewards for tests of `ZORewardTrainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_helpers import arguments
from models import tiny
from torch.utils.data import IterableDataset
from trl_helpers import sentence

from hf_zo import ZORewardConfig, ZORewardTrainer

PROMPTS = [{"prompt": sentence(index, 2 + index % 3), "wanted": f"w{index}"} for index in range(8)]


class Stream(IterableDataset[Any]):
    """The rows of `PROMPTS`, in order."""

    def __iter__(self) -> Any:
        return iter(PROMPTS)


def words(completions: list[str], **_: Any) -> list[float]:
    """The share of even words, which depends on the weights in many small steps."""
    ids = [[int(word[1:]) for word in text.split()] for text in completions]
    return [sum(number % 2 == 0 for number in each) / max(1, len(each)) for each in ids]


class Seen:
    """Keeps what it is called with."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, **given: Any) -> list[float]:
        self.calls.append(given)
        return words(**given)


def reward_trainer(
    path: Path, tokenizer: Any, rewards: Any = words, cls: type[Any] = ZORewardTrainer, **own: Any
) -> Any:
    """A trainer of two steps; keywords that are not arguments of the trainer are training arguments."""
    names = ("model", "peft_config", "quantization_config", "callbacks", "train_dataset", "eval_dataset", "zo_config")
    names += ("tools", "rollout_func", "environment_factory")
    given = {name: own.pop(name) for name in names if name in own}
    given = {"model": tiny("llama", tied=False), "train_dataset": PROMPTS, **given}
    settings = {"max_completion_length": 6, "zo_num_probes": 4, "zo_eps": 0.05, "learning_rate": 0.02, **own}
    args = arguments(path, ZORewardConfig, **settings)
    return cls(reward_funcs=rewards, args=args, processing_class=tokenizer, **given)
