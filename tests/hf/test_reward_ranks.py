"""Law: a reward run in two processes has the weights of one process, and its one log replays to them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from models import tiny
from processes import Raised, together
from reward_helpers import PROMPTS, Stream, reward_trainer
from torch.utils.data import SequentialSampler

from hf_zo import ZORewardTrainer
from zo_core import SeedLog, replay

pytestmark = pytest.mark.slow  # each process makes a trainer


class Ordered(ZORewardTrainer):
    """Takes its rows in order, as one process and two alike can."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def train(folder: Path, tokenizer: Any, **settings: Any) -> dict[str, Any]:
    trainer = reward_trainer(folder, tokenizer, cls=Ordered, **{"max_steps": 3, "zo_log": True, **settings})
    trainer.train()
    lines = [line for line in trainer.state.log_history if "reward" in line]
    assert trainer.accelerator.num_processes == (2 if torch.distributed.is_initialized() else 1)
    return {"state": trainer.model.state_dict(), "reward": [line["reward"] for line in lines]}


def in_two(folder: Path, tokenizer: Any, **settings: Any) -> list[Any]:
    def work(rank: int) -> dict[str, Any]:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        os.environ.update(
            OMP_NUM_THREADS="1", MASTER_ADDR="localhost", MASTER_PORT="1"
        )  # asked for, not used: there is a group already
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        return train(folder, tokenizer, **settings)

    return together(work, folder / "meeting", seconds=240)


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_members_of_one_population_in_two_processes(tmp_path: Path, tokenizer: Any) -> None:
    first, second = in_two(tmp_path, tokenizer, zo_ranks="points")
    alone = train(tmp_path / "alone", tokenizer)
    assert equal(first["state"], second["state"])
    assert equal(first["state"], alone["state"])
    assert not equal(first["state"], tiny("llama", tied=False).state_dict())
    assert first["reward"] == pytest.approx(alone["reward"], rel=1e-12)
    model = tiny("llama", tied=False)
    replay(model, tmp_path / "out" / "seedlog.zo")
    assert equal(model.state_dict(), alone["state"])


@pytest.mark.parametrize("rows", [PROMPTS, Stream()], ids=["list", "stream"])
def test_prompts_of_one_batch_in_two_processes(rows: Any, tmp_path: Path, tokenizer: Any) -> None:
    """The score of a member is the mean over the prompts of both, as it is over two micro-batches of one process."""
    given = {"zo_ranks": "data", "per_device_train_batch_size": 2, "train_dataset": rows, "max_steps": 2}
    first, second = in_two(tmp_path, tokenizer, **given)
    own = {"train_dataset": rows, "max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    alone = train(tmp_path / "alone", tokenizer, **own)
    assert equal(first["state"], second["state"])
    assert equal(first["state"], alone["state"])


def test_each_process_has_a_population_of_its_own(tmp_path: Path, tokenizer: Any) -> None:
    first, second = in_two(tmp_path, tokenizer, per_device_train_batch_size=2)
    assert equal(first["state"], second["state"])
    log = SeedLog.read(tmp_path / "out" / "seedlog.zo")
    assert {len(step.probes) for step in log.steps if step.probes} == {8}
    model = tiny("llama", tied=False)
    replay(model, tmp_path / "out" / "seedlog.zo")
    assert equal(model.state_dict(), first["state"])


def test_a_reward_that_fails_in_one_process_ends_both_and_moves_nothing(tmp_path: Path, tokenizer: Any) -> None:
    def broken(completions: list[str], **_: Any) -> list[float]:
        if os.environ.get("RANK") == "1":
            raise OSError("the judge is away")
        return [float(len(text) % 3) for text in completions]

    found = in_two(tmp_path, tokenizer, rewards=broken)
    assert all(isinstance(each, Raised) and "the judge is away" in each.text for each in found)
