"""What backpropagation does with the rewards of `examples/rewards.py`, at the same number of completions.

Policy gradients as in GRPO with one update for each batch: the same small model, prompts, reward and number of
completions per step, but 16 sampled completions of each prompt in place of a population, advantages centred per prompt
and divided by their standard deviation, and AdamW.

    python -m benchmarks.reward_gradient --save
    python -m benchmarks.reward_gradient --task sums --pretraining-steps 1200 --steps 80 --save

Each step also runs a forward and a backward pass over all completions. The rate is searched with a seed that the table
does not use: it is tripled, or divided by three, for as long as that is better.
"""

from __future__ import annotations

import argparse
import copy
import functools
import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import log_softmax
from transformers import LlamaForCausalLM

from hf_zo import ZORewardConfig
from hf_zo.completions import Answer, Completer

from .report import save

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import rewards as example

Rows = list[dict[str, Any]]
#: The seed of the search for the rate.
SEARCH_SEED = 100


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


@functools.cache
def trained(name: str, steps: int, seed: int) -> tuple[example.Task, LlamaForCausalLM]:
    """A task, and the model that has learnt its text."""
    task = example.sums() if name == "sums" else example.capitals()  # its text is drawn as it is read
    return task, example.small_model(task.text(), example.byte_tokenizer(task.template), steps, seed)


def run(args: argparse.Namespace, seed: int, lr: float) -> tuple[float, float]:
    """The held-out reward before and after."""
    task, model = trained(args.task, args.pretraining_steps, seed)
    tokenizer, rows, model = example.byte_tokenizer(task.template), task.rows, copy.deepcopy(model)
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
    after = held_out(model, greedy, task, rows[:64])
    print(f"rate {lr:g}, seed {seed}: {before:.3f} before, {after:.3f} after", flush=True)
    return before, after


def searched(args: argparse.Namespace) -> dict[float, float]:
    """The reward after a run, by the rate."""
    found = {args.learning_rate: run(args, SEARCH_SEED, args.learning_rate)[1]}
    for factor in (3.0, 1 / 3):
        lr = args.learning_rate
        while True:
            found[lr * factor] = run(args, SEARCH_SEED, lr * factor)[1]
            if found[lr * factor] <= found[lr]:
                break
            lr *= factor
        if lr != args.learning_rate:
            break
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=["capitals", "sums"], default="capitals")
    parser.add_argument("--pretraining-steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="where the search begins")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--generations", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = searched(args)
    rows = [[f"{lr:.2g}", str(SEARCH_SEED), "", f"{after:.3f}"] for lr, after in sorted(found.items())]
    best = max(found, key=found.__getitem__)
    for seed in args.seeds:
        before, after = run(args, seed, best)
        rows.append([f"{best:.2g}", str(seed), f"{before:.3f}", f"{after:.3f}"])
    title = f"Policy gradients with backpropagation, task {args.task!r}, as many completions as the population"
    columns = ["rate", "seed", "before", "after"]
    save(f"reward-gradient-{args.task}", title, columns, rows, torch.device("cpu"), write=args.save)


if __name__ == "__main__":
    main()
