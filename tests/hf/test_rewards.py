"""Law: a run on rewards is evolution strategies on what the model generates, and its logs are of its own steps."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hf_helpers import differing, logged, weights
from models import tiny
from peft import LoraConfig
from reward_helpers import PROMPTS, Seen, Stream, reward_trainer, words
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback

from hf_zo import ZORewardTrainer
from zo_core import QueryError, Rademacher, SeedLog, ZeroOrder, ZOConfig, derive_seed, replay

pytestmark = pytest.mark.filterwarnings("ignore:.*generation flags.*")


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


def test_adapters_begin_the_same_in_every_process(tmp_path: Path, tokenizer: Any) -> None:
    peft = LoraConfig(task_type="CAUSAL_LM", r=2)
    own = {"peft_config": peft, "zo_eps": 0.5, "zo_num_probes": 2, "max_completion_length": 3, "max_steps": 4}
    torch.manual_seed(1)  # a process comes to the trainer with whatever it has drawn before
    whole = reward_trainer(tmp_path / "whole", tokenizer, **own)
    whole.train()
    torch.manual_seed(2)
    with pytest.raises(KeyboardInterrupt):
        reward_trainer(tmp_path / "cut", tokenizer, callbacks=[Kill()], **own).train()
    torch.manual_seed(3)
    cut = reward_trainer(tmp_path / "cut", tokenizer, **own)
    cut.train(resume_from_checkpoint=True)
    assert not differing(weights(whole.model), weights(cut.model))


class Ordered(ZORewardTrainer):
    """Takes the rows of a data set in order, as those of a stream come."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def test_rows_of_a_stream_are_trained_on_and_evaluated_as_those_of_a_list(tmp_path: Path, tokenizer: Any) -> None:
    own = {"max_steps": 2, "zo_num_probes": 2, "max_completion_length": 3, "per_device_eval_batch_size": 3}
    rows = reward_trainer(tmp_path / "rows", tokenizer, cls=Ordered, **own)
    rows.train()
    for stream in (Stream(), Dataset.from_list(PROMPTS).to_iterable_dataset()):
        given = {"train_dataset": stream, "eval_dataset": stream, **own}
        streamed = reward_trainer(tmp_path / "stream", tokenizer, **given)
        streamed.train()
        assert not differing(weights(rows.model), weights(streamed.model))
        wanted = rows.evaluate(PROMPTS)["eval_reward"]
        assert streamed.evaluate()["eval_reward"] == rows.evaluate(stream)["eval_reward"] == wanted


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


def test_logs_begin_anew_with_each_run_and_keep_one_sum_of_each_number(tmp_path: Path, tokenizer: Any) -> None:
    more = 0.0

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [more + share for share in words(completions)]

    own = {"zo_num_probes": 2, "max_completion_length": 3}
    trainer = reward_trainer(tmp_path, tokenizer, reward, max_steps=5, logging_steps=3, **own)
    trainer.train()
    more = 100.0
    trainer.train()
    assert logged(trainer, "reward") == pytest.approx([-loss for loss in logged(trainer, "loss")])
    assert logged(trainer, "reward")[-1] > 100
    total, count = trainer._zo_sums["reward"]  # of steps 4 and 5, which no log has
    assert count == 2
    assert total == pytest.approx(sum(-step.loss for step in SeedLog.read(tmp_path / "out" / "seedlog.zo").steps[3:]))


@pytest.mark.parametrize("same", [False, True], ids=["new process", "same process"])
def test_completions_of_repeated_steps_stay_as_they_were_logged(same: bool, tmp_path: Path, tokenizer: Any) -> None:
    def written() -> dict[str, str]:
        return {path.name: path.read_text() for path in (tmp_path / "out" / "completions").iterdir()}

    own = {"max_steps": 4, "log_completions": True, "zo_num_probes": 2, "max_completion_length": 3}
    trainer = reward_trainer(tmp_path, tokenizer, callbacks=[Kill()], **own)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    before = written()
    assert sorted(before) == ["completions_00001.jsonl", "completions_00002.jsonl"]
    if same:
        trainer.remove_callback(Kill)
    else:
        trainer = reward_trainer(tmp_path, tokenizer, **own)
    trainer.train(resume_from_checkpoint=True)
    after = written()
    assert sorted(after) == [*sorted(before), "completions_00004.jsonl"]
    assert before.items() <= after.items()
    assert all(json.loads(line)["step"] == 4 for line in after["completions_00004.jsonl"].splitlines())


@pytest.mark.parametrize(("failing", "kept"), [(3, [2, 3]), (5, [1, 3])])  # the first step asks three times, not twice
def test_a_step_that_is_skipped_has_no_completions(
    failing: int, kept: list[int], tmp_path: Path, tokenizer: Any
) -> None:
    calls: list[Any] = []

    def judge(completions: list[str], **_: Any) -> list[float]:
        calls.append(completions)
        if len(calls) == failing:
            raise QueryError("no judge")
        return words(completions)

    own = {"log_completions": True, "zo_num_probes": 2, "max_completion_length": 3}
    trainer = reward_trainer(tmp_path, tokenizer, judge, max_steps=3, **own)
    trainer.train()
    names = sorted(path.name for path in (tmp_path / "out" / "completions").iterdir())
    assert names == [f"completions_{step:05d}.jsonl" for step in kept]
    assert [line["step"] for line in trainer.state.log_history if "reward" in line] == kept


def test_an_evaluation_of_no_rows_reports_no_rewards(tmp_path: Path, tokenizer: Any) -> None:
    metrics = reward_trainer(tmp_path, tokenizer).evaluate(eval_dataset=[])
    assert not [name for name in metrics if "reward" in name or "completions" in name]


def test_an_evaluation_weighs_a_smaller_last_batch_by_its_rows(tmp_path: Path, tokenizer: Any) -> None:
    def mine(wanted: list[str], **_: Any) -> list[float]:
        return [float(word[1:]) for word in wanted]

    trainer = reward_trainer(tmp_path, tokenizer, mine, eval_dataset=PROMPTS[:5], per_device_eval_batch_size=4)
    assert trainer.evaluate()["eval_reward"] == 2.0
