"""Law: reward functions are called as TRL calls them, and a wrong result of one moves nothing."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import differing, logged, weights
from models import tiny
from reward_helpers import PROMPTS, Seen, reward_trainer, words
from torch import nn

from hf_zo.completions import Answer, compared, score
from hf_zo.reward_functions import RewardFunctions
from zo_core import LossError

pytestmark = pytest.mark.filterwarnings("ignore:.*generation flags.*")


# How reward functions are called


def test_functions_get_columns_by_name_and_the_state_of_the_trainer(tmp_path: Path, tokenizer: Any) -> None:
    seen = Seen()
    trainer = reward_trainer(tmp_path, tokenizer, seen, max_steps=1)
    trainer.train()
    call = seen.calls[0]
    documented = {"prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra"}
    assert set(call) == {*documented, "wanted"}
    assert call["trainer_state"] is trainer.state
    by_prompt = {row["prompt"]: row["wanted"] for row in PROMPTS}
    assert call["wanted"] == [by_prompt[prompt] for prompt in call["prompts"]]
    decoded = tokenizer.batch_decode(call["completion_ids"], skip_special_tokens=True)
    assert call["completions"] == decoded


def test_conversations_are_completed_by_messages(tmp_path: Path, tokenizer: Any) -> None:
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w9{% endif %}"
    tokenizer.chat_template = template
    seen: list[Any] = []

    def reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        seen.append((prompts, completions))
        return words([messages[0]["content"] for messages in completions])

    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in PROMPTS]
    try:
        trainer = reward_trainer(tmp_path, tokenizer, reward, train_dataset=rows, max_steps=1)
        trainer.train()
        plain = trainer.completer(tiny("llama", tied=False), ["w1 w9"], 1, 42, 0)
        talked = trainer.completer(tiny("llama", tied=False), [[{"role": "user", "content": "w1"}]], 1, 42, 0)
    finally:
        tokenizer.chat_template = None
    prompts, completions = seen[0]
    assert all(prompt in [row["prompt"] for row in rows] for prompt in prompts)
    assert all(messages[0]["role"] == "assistant" and len(messages) == 1 for messages in completions)
    assert plain[0].ids == talked[0].ids


def test_what_a_function_does_to_a_conversation_stays_its_own() -> None:
    def spoil(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        for prompt, completion in zip(prompts, completions, strict=True):
            prompt += completion
            completion.clear()
        return [float(len(prompt)) for prompt in prompts]

    prompt = [{"role": "user", "content": "w1"}]
    given = {"prompts": [prompt, prompt], "completions": [[{"role": "assistant", "content": str(i)}] for i in range(2)]}
    assert RewardFunctions([spoil, spoil])(given) == [[2.0, 2.0], [2.0, 2.0]]
    assert len(prompt) == 1


def columns(*completions: str) -> dict[str, list[Any]]:
    count = len(completions)
    return {"prompts": ["p"] * count, "completions": list(completions), "completion_ids": [[0]] * count}


def test_asynchronous_functions_run_at_the_same_time_and_in_one_loop() -> None:
    loops, both = set(), None

    async def meet(completions: list[str], **_: Any) -> list[float]:
        nonlocal both
        both = both or asyncio.Barrier(2)
        await asyncio.wait_for(both.wait(), 10)
        loops.add(asyncio.get_running_loop())
        return [1.0] * len(completions)

    functions = RewardFunctions([meet, len_of, meet])
    for _ in range(2):
        assert functions(columns("a", "bc")) == [[1.0, 1.0], [1.0, 2.0], [1.0, 1.0]]
    assert len(loops) == 1
    assert functions.names == ["meet_1", "len_of", "meet_2"]


def test_the_loop_of_asynchronous_functions_ends_with_them() -> None:
    loops = []

    async def judge(completions: list[str], **_: Any) -> list[float]:
        loops.append(asyncio.get_running_loop())
        return [1.0] * len(completions)

    before = threading.enumerate()
    functions = RewardFunctions(judge)
    functions(columns("a"))
    (thread,) = set(threading.enumerate()) - set(before)
    del functions
    thread.join(10)
    assert not thread.is_alive()
    assert loops[0].is_closed()


def len_of(completions: list[str], **_: Any) -> list[int]:
    return [len(text) for text in completions]


def test_none_leaves_a_function_out_for_that_completion() -> None:
    def first(completions: list[str], **_: Any) -> list[float | None]:
        return [3.0, None, None]

    def second(completions: list[str], **_: Any) -> torch.Tensor:
        return torch.tensor([1.0, 5.0, 7.0])

    functions = RewardFunctions([first, second], [2.0, 0.5])
    rewards = functions(columns("a", "b", "c"))
    assert [functions.total(row) for row in zip(*rewards, strict=True)] == [6.5, 2.5, 3.5]
    assert RewardFunctions(first).total([None]) is None


def test_a_member_without_a_reward_is_neither_better_nor_worse_for_it() -> None:
    def answer(total: float | None) -> Answer:
        return Answer("p", ["c"], [[1]], [True], [[total]], [total])

    # The second prompt is an easy one: leaving it out of a mean would punish the member that has none for it.
    members = [[answer(0.0), answer(1.0)], [answer(0.0), answer(1.0)], [answer(0.0), answer(None)]]
    assert compared(members) == [0.5, 0.5, 0.5]
    assert [score(member) for member in members] == [0.5, 0.5, 0.0]
    assert score([answer(None)]) == 0.0


def test_scores_are_compared_by_prompt_where_rewards_are_missing(tmp_path: Path, tokenizer: Any) -> None:
    calls = iter(range(100))

    def reward(prompts: list[str], **_: Any) -> list[float | None]:
        member = next(calls)
        easy = [float(prompt == PROMPTS[0]["prompt"]) for prompt in prompts]
        return [None if value and member == 3 else value for value in easy]

    start = weights(tiny("llama", tied=False))
    trainer = reward_trainer(tmp_path, tokenizer, reward, train_dataset=PROMPTS[:4], max_steps=1)
    trainer.train()
    assert logged(trainer, "zo_skipped_steps") == [1.0]  # all agree wherever they have a reward
    assert not differing(start, weights(trainer.model))


def test_a_classifier_is_a_reward_model() -> None:
    class Tokens:
        pad_token, eos_token, pad_token_id = "<pad>", "</s>", 0

        def __call__(self, texts: list[str], **_: Any) -> Any:
            return Inputs(lengths=torch.tensor([len(text) for text in texts]))

    class Inputs(dict[str, Any]):
        def to(self, device: Any) -> Inputs:
            return self

    class Classifier(nn.Module):
        class config:
            name_or_path, pad_token_id = "someone/judge", None

        device = torch.device("cpu")

        def forward(self, lengths: torch.Tensor) -> Any:
            return type("Output", (), {"logits": lengths[:, None].float()})

    functions = RewardFunctions(Classifier(), tokenizers=Tokens())
    assert functions.names == ["judge"]
    assert functions(columns("a", "bcd")) == [[2.0, 4.0]]


# What is refused


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (lambda good: good[:-1], "'judge' returned 3 rewards for 4 completions"),
        (lambda good: good[0], "'judge' returned a float"),
        (lambda good: [*good[:-1], float("nan")], "'judge' returned nan for completion 3"),
        (lambda good: [*good[:-1], float("inf")], "'judge' returned inf for completion 3"),
        (lambda good: torch.tensor(good)[:, None], r"'judge' returned an array of the shape \[4, 1\]; .* shape \[4\]"),
        (lambda good: [*good[:-1], "high"], "'judge' returned 'high' for completion 3"),
    ],
)
def test_a_wrong_result_of_any_member_names_the_function_and_moves_nothing(
    tmp_path: Path, tokenizer: Any, bad: Any, said: str
) -> None:
    calls = []

    def judge(completions: list[str], **_: Any) -> Any:
        calls.append(completions)
        good = words(completions)
        return bad(good) if len(calls) == 4 else good

    trainer = reward_trainer(tmp_path, tokenizer, judge)
    start = weights(trainer.model)
    with pytest.raises(LossError, match=said):
        trainer.train()
    assert not differing(start, weights(trainer.model))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_exception_of_any_member_names_the_function_and_moves_nothing(
    tmp_path: Path, tokenizer: Any, asynchronous: bool
) -> None:
    calls: list[Any] = []

    def judge(completions: list[str], **_: Any) -> list[float]:
        calls.append(completions)
        if len(calls) == 4:
            raise ZeroDivisionError("no judge")
        return words(completions)

    async def later(**given: Any) -> list[float]:
        return judge(**given)

    trainer = reward_trainer(tmp_path, tokenizer, later if asynchronous else judge)
    start = weights(trainer.model)
    with pytest.raises(ZeroDivisionError, match="no judge") as raised:
        trainer.train()
    assert f"The reward function {'later' if asynchronous else 'judge'!r} raised this" in raised.value.__notes__[0]
    assert not differing(start, weights(trainer.model))
    trainer.train()  # the next run is not disturbed
