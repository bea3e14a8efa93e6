"""What a population learns from the rewards of `examples/rewards.py`, with no learning rate given.

    python -m benchmarks.rewards --method full --save
    python -m benchmarks.rewards --method activations --save
    python -m benchmarks.rewards --method lora --steps 100 --save
    python -m benchmarks.rewards --method scales --steps 120 --save
    python -m benchmarks.rewards --task sums --steps 80 --pretraining-steps 1200 --save      # needs reasoning-gym

Each is the example as a user runs it, with its own eps for the method and the default rate, once for each seed; a seed
is that of the model, of the order of the prompts and of the directions.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

from .report import save

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import rewards as example

#: What is trained, for the table.
TRAINED = {
    "full": "all weights",
    "activations": "an adapter along the activations",
    "lora": "LoRA with random signs as its A, frozen",
    "scales": "scales of nf4",
}


def run(args: argparse.Namespace, seed: int) -> list[str]:
    """A row: what was run, the reward of held-out prompts before and after, and what it took."""
    args.seed = seed
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        trainer = example.trainer_for(args, folder)
        before = trainer.evaluate()["eval_reward"]
        trainer.train()
        after = trainer.evaluate()["eval_reward"]
        assert trainer.zo is not None
        rate, eps = trainer.zo.lr, trainer.zo.eps
    took = time.process_time() - begun
    what = [args.task, TRAINED[args.method], f"{eps:g}", f"{rate:.2g}", str(args.steps), str(seed)]
    return [*what, f"{before:.3f}", f"{after:.3f}", f"{took:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], parents=[example.parser()], add_help=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed in args.seeds:
        rows.append(run(args, seed))
        print(rows[-1], flush=True)
    columns = ["task", "what is trained", "eps", "rate", "steps", "seed", "before", "after", "processor seconds"]
    title = f"Rewards: {TRAINED[args.method]}, task {args.task!r}, {args.population} members, {args.prompts} prompts"
    save(f"rewards-{args.task}-{args.method}", title, columns, rows, torch.device("cpu"), write=args.save)


if __name__ == "__main__":
    main()
