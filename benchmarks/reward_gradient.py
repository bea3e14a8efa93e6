"""What backpropagation does with the rewards of `examples/rewards.py`, at the same number of completions.

Policy gradients as in GRPO with one update for each batch: the same small model, prompts, reward and number of
completions per step, but 16 sampled completions of each prompt in place of a population, advantages centred per prompt
and divided by their standard deviation, and AdamW.

    python -m benchmarks.reward_gradient --seeds 0 1 2
    python -m benchmarks.reward_gradient --task sums --pretraining-steps 1200 --steps 80

Each step also runs a forward and a backward pass over all completions.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import log_softmax
from transformers import LlamaForCausalLM

from hf_zo import ZORewardConfig
from hf_zo.completions import Answer, Completer

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import rewards as example

Rows = list[dict[str, Any]]


def rewarded(task: example.Task, answers: list[Answer], rows: Rows) -> torch.Tensor:
    """The rewards of the completions of each row, float32 ``[rows, completions]``."""
    found = []
    for each, row in zip(answers, rows, strict=True):
        columns = {name: [value] * len(each.completions) for name, value in row.items() if name != "prompt"}
        found.append(task.reward(each.completions, **columns))
    return torch.tensor(found)


def held_out(model: LlamaForCausalLM, complete: Completer, task: example.Task, rows: Rows) -> float:
    """The mean reward of greedy completions."""
    with torch.no_grad():
        answers = complete(model.eval(), [row["prompt"] for row in rows], 1, 0, 0)
    return float(rewarded(task, answers, rows).mean())


def step_loss(
    model: LlamaForCausalLM, sample: Completer, task: example.Task, rows: Rows, times: int, seed: int, step: int
) -> torch.Tensor:
    """Minus the advantage-weighted log-probability of sampled completions, a mean over their tokens."""
    prompts = [row["prompt"] for row in rows]
    with torch.no_grad():
        answers = sample(model.eval(), prompts, times, seed, step)
    rewards = rewarded(task, answers, rows)
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    inputs = sample.encode(prompts, torch.device("cpu"))
    ids = inputs["input_ids"].repeat_interleave(times, 0)
    mask = inputs["attention_mask"].repeat_interleave(times, 0)
    said = [torch.tensor(tokens) for each in answers for tokens in each.ids]
    tail = torch.nn.utils.rnn.pad_sequence(said, batch_first=True, padding_value=256)
    written = (tail != 256).long()
    full, seen = torch.cat([ids, tail], 1), torch.cat([mask, written], 1)
    logits = model(input_ids=full, attention_mask=seen).logits[:, ids.shape[1] - 1 : -1]
    logps = log_softmax(logits, -1).gather(-1, tail[..., None])[..., 0]
    return -(logps * written * advantages.flatten()[:, None]).sum() / written.sum()


def run(task: example.Task, args: argparse.Namespace, seed: int, lr: float) -> tuple[float, float]:
    """The held-out reward before and after."""
    tokenizer, rows = example.byte_tokenizer(task.template), task.rows
    model = example.small_model(task.text(), tokenizer, args.pretraining_steps, seed)
    ends = [model.generation_config.eos_token_id]
    common = {"max_completion_length": 6, "use_cpu": True, "report_to": "none"}
    greedy = Completer(tokenizer, ZORewardConfig("unused", **common), ends)
    sample = Completer(tokenizer, ZORewardConfig("unused", temperature=1.0, **common), ends)
    before = held_out(model, greedy, task, rows[:64])
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    order = random.Random(seed)
    for step in range(args.steps):
        some = order.sample(rows[64:], args.prompts)
        step_loss(model, sample, task, some, args.generations, seed, step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return before, held_out(model, greedy, task, rows[:64])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=["capitals", "sums"], default="capitals")
    parser.add_argument("--pretraining-steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--generations", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=32)
    args = parser.parse_args()
    for lr in args.learning_rates:
        for seed in args.seeds:
            task = example.sums() if args.task == "sums" else example.capitals()  # its text is drawn as it is read
            before, after = run(task, args, seed, lr)
            print(f"rate {lr:g}, seed {seed}: {before:.3f} before, {after:.3f} after", flush=True)


if __name__ == "__main__":
    main()
