"""Law: a run on rewards is evolution strategies on what the model generates, and calls rewards as TRL does."""

from __future__ import annotations

import asyncio
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import differing, logged, weights
from models import tiny
from peft import LoraConfig
from reward_helpers import PROMPTS, reward_trainer, words
from torch import nn
from transformers import TrainerCallback

from hf_zo.completions import Answer, compared, score
from hf_zo.reward_functions import RewardFunctions
from zo_core import LossError, Rademacher, SeedLog, ZeroOrder, ZOConfig, derive_seed, replay

pytestmark = pytest.mark.filterwarnings("ignore:.*generation flags.*")


class Seen:
    """Keeps what it is called with."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, **given: Any) -> list[float]:
        self.calls.append(given)
        return words(**given)


# What the trainer does


def test_each_member_answers_the_same_prompts_and_steps_follow_the_scores(tmp_path: Path, tokenizer: Any) -> None:
    seen, start = Seen(), weights(tiny("llama", tied=False))
    trainer = reward_trainer(tmp_path, tokenizer, seen)
    trainer.train()
    assert differing(start, weights(trainer.model))
    steps = [seen.calls[:5], seen.calls[5:]]  # the first step looks twice at its first member
    assert [len(step) for step in steps] == [5, 4]
    for step in steps:
        assert all(call["prompts"] == step[0]["prompts"] for call in step)
    assert len({str(call["completions"]) for call in steps[0]}) == 4

    model, batches = tiny("llama", tied=False), [step[0]["prompts"] for step in steps]
    args = trainer.args
    zo = ZeroOrder(model, estimator="es", noise="low_rank", num_probes=4, eps=0.05, lr=0.02, maximize=True, seed=42)
    for step, prompts in enumerate(batches):

        def closure(prompts: Any = prompts, step: int = step) -> float:
            answers = trainer.completer(model, prompts, 1, args.seed, step)
            return statistics.fmean(words([each.completions[0] for each in answers]))

        zo.step(closure)
    assert not differing(weights(model), weights(trainer.model))


def test_completions_are_those_of_the_perturbed_weights(tmp_path: Path, tokenizer: Any) -> None:
    seen = Seen()
    config = ZOConfig(eps=0.05, num_probes=3, estimator="es")
    trainer = reward_trainer(tmp_path, tokenizer, seen, max_steps=1, zo_eps=None, zo_num_probes=None, zo_config=config)
    trainer.train()
    assert trainer.zo.oracle.realisation.whole  # one copy for each member, not one for each layer and token
    start = tiny("llama", tied=False)
    for index, call in enumerate(seen.calls[1:]):
        seed = derive_seed(42, 0, index)
        moved = tiny("llama", tied=False)
        for slot in ZeroOrder(moved, lr=0.0).slots:
            slot.tensor.data += Rademacher().z(seed, slot.key, 0, slot.tensor.numel(), scale=0.05).view_as(slot.tensor)
        ids = trainer.completer(moved.eval(), call["prompts"], 1, 42, 0)
        assert [each.ids[0] for each in ids] == call["completion_ids"]
    assert differing(weights(start), weights(trainer.model))


def test_sampling_is_the_same_for_all_members_and_draws_nothing_from_the_global_generators(
    tmp_path: Path, tokenizer: Any
) -> None:
    seen = Seen()
    own = {"temperature": 1.0, "num_generations": 3, "zo_eps": 1e-9, "max_steps": 1}
    trainer = reward_trainer(tmp_path, tokenizer, seen, **own)
    trainer.train()
    first = seen.calls[0]
    assert all(call["completions"] == first["completions"] for call in seen.calls)  # eps moves nothing here
    assert len(set(first["completions"])) > 4
    assert first["prompts"][0] == first["prompts"][2] != first["prompts"][3]
    assert not any(step.draws for step in SeedLog.read(tmp_path / "out" / "seedlog.zo").steps)


def test_equal_scores_skip_the_step_and_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    start = weights(tiny("llama", tied=False))
    trainer = reward_trainer(tmp_path, tokenizer, lambda completions, **_: [1.0] * len(completions))
    trainer.train()
    assert not differing(start, weights(trainer.model))
    assert logged(trainer, "zo_skipped_steps") == [1.0, 1.0]
    assert logged(trainer, "frac_reward_zero_std") == [1.0, 1.0]


class Kill(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_killed_run_resumes_from_its_log_and_replays(tmp_path: Path, tokenizer: Any, temperature: float) -> None:
    own = {"num_train_epochs": 3, "temperature": temperature}
    whole = reward_trainer(tmp_path / "whole", tokenizer, **own)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        reward_trainer(tmp_path / "cut", tokenizer, callbacks=[Kill()], **own).train()
    seen = Seen()
    cut = reward_trainer(tmp_path / "cut", tokenizer, seen, **own)
    cut.train(resume_from_checkpoint=True)
    assert len(seen.calls) == 1 + 3 * 4  # nothing is generated for the steps that the log has
    assert not differing(weights(whole.model), weights(cut.model))
    again = tiny("llama", tied=False)
    replay(again, tmp_path / "cut" / "out" / "seedlog.zo")
    assert not differing(weights(whole.model), weights(again))


def test_adapters_are_trained_alone(tmp_path: Path, tokenizer: Any) -> None:
    peft = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    trainer = reward_trainer(tmp_path, tokenizer, peft_config=peft, zo_eps=0.5)
    start = weights(trainer.model)
    trainer.train()
    moved = differing(start, weights(trainer.model))
    assert moved
    assert all("lora_" in name for name in moved)


def test_streamed_weights_move_as_resident_ones(tmp_path: Path, tokenizer: Any) -> None:
    here = reward_trainer(tmp_path / "here", tokenizer)
    away = reward_trainer(tmp_path / "away", tokenizer, zo_offload="cpu")
    here.train()
    away.train()
    away.zo.close()
    assert not differing(weights(here.model), weights(away.model))
    assert logged(here, "reward") == logged(away, "reward")


# What is reported


def test_logs_have_the_rewards_of_the_population_and_evaluations_those_of_the_model(
    tmp_path: Path, tokenizer: Any
) -> None:
    def long(completion_ids: list[list[int]], log_metric: Any, log_extra: Any, **_: Any) -> list[float]:
        log_metric("mine", 2.0)
        log_extra("tokens", [len(ids) for ids in completion_ids])
        return [float(len(ids)) for ids in completion_ids]

    seen, own = Seen(), {"reward_weights": [1.0, 0.5], "log_completions": True, "num_completions_to_print": 2}
    trainer = reward_trainer(tmp_path, tokenizer, [seen, long], eval_dataset=PROMPTS[:3], max_steps=1, **own)
    trainer.train()
    calls = seen.calls[1:]
    shares = [value for call in calls for value in words(call["completions"])]
    lengths = [len(ids) for call in calls for ids in call["completion_ids"]]
    entry = trainer.state.log_history[0]
    assert entry["rewards/Seen/mean"] == pytest.approx(sum(shares) / 16)
    assert entry["rewards/long/mean"] == entry["completions/mean_length"] == pytest.approx(sum(lengths) / 16)
    assert entry["reward"] == pytest.approx(sum(shares) / 16 + 0.5 * sum(lengths) / 16)
    assert entry["loss"] == pytest.approx(-entry["reward"], rel=1e-5)
    assert entry["mine"] == 2.0
    lines = (tmp_path / "out" / "completions" / "completions_00001.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["completion"] for row in rows] == calls[0]["completions"][:2]
    assert [row["tokens"] for row in rows] == lengths[:2]

    seen.calls.clear()
    metrics = trainer.evaluate()
    answers = trainer.completer(trainer.model, [row["prompt"] for row in PROMPTS[:3]], 1, 42, 0)
    assert [call["completions"] for call in seen.calls] == [[each.completions[0] for each in answers]]
    assert metrics["eval_rewards/Seen/mean"] == pytest.approx(sum(words(seen.calls[0]["completions"])) / 3)
    assert metrics["eval_loss"] == -metrics["eval_reward"]


def test_an_evaluation_of_no_rows_reports_no_rewards(tmp_path: Path, tokenizer: Any) -> None:
    metrics = reward_trainer(tmp_path, tokenizer).evaluate(eval_dataset=[])
    assert not [name for name in metrics if "reward" in name or "completions" in name]


def test_an_evaluation_weighs_a_smaller_last_batch_by_its_rows(tmp_path: Path, tokenizer: Any) -> None:
    def mine(wanted: list[str], **_: Any) -> list[float]:
        return [float(word[1:]) for word in wanted]

    trainer = reward_trainer(tmp_path, tokenizer, mine, eval_dataset=PROMPTS[:5], per_device_eval_batch_size=4)
    assert trainer.evaluate()["eval_reward"] == 2.0


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
