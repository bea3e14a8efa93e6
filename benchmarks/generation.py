"""How fast does a member of a population generate, compared with the model's own ``generate``?

Side by side in one run, interleaved, medians over the rounds: plain ``generate``; with low-rank directions, which no
layer's weights are copied for; with one whole perturbed copy of the weights; and with copies made layer by layer,
which is how a loss is measured, and which here happens again for every token.

    python -m benchmarks.generation --save

Greedy, with a cache of keys and values, all prompts in one batch. Each contender generates the same number of tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaForCausalLM

from zo_core import Point, ZeroOrder

from .report import save
from .step_overhead import llama_60m
from .timing import medians


def measure(dtype: torch.dtype, device: torch.device, prompts: int, tokens: int, rounds: int) -> dict[str, float]:
    """Median seconds of each contender."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_60m()).to(device, dtype).eval()
    ids = torch.randint(0, 32000, (prompts, 16), device=device)
    how: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}

    @torch.no_grad()
    def generate() -> float:
        return float(model.generate(ids, attention_mask=torch.ones_like(ids), **how).shape[1])

    contenders: dict[str, Callable[[], object]] = {"generate, unperturbed": generate}

    def member(name: str, **settings: Any) -> None:
        whole = settings.pop("whole", False)
        zo = ZeroOrder(model, lr=1e-7, **settings)
        if whole:
            zo.copy_whole()
        point = Point(zo.noise.seed(0, 0, 0), 1e-3)
        contenders[name] = lambda: zo.oracle.losses((point,), generate)

    member("low-rank directions, no copy", noise="low_rank")
    member("one whole copy of the weights", whole=True)
    member("copies layer by layer, each token")
    for run in contenders.values():
        run()
    return medians(contenders, rounds, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    args = parser.parse_args()
    device, rows = torch.device(args.device), []
    for prompts in args.prompts:
        seconds = measure(getattr(torch, args.dtype), device, prompts, args.tokens, args.rounds)
        base = seconds["generate, unperturbed"]
        for name, value in seconds.items():
            rows.append([str(prompts), name, f"{prompts * args.tokens / value:.0f}", f"{base / value:.2f}"])
    save(
        f"generation-llama55m-{args.dtype}",
        f"Generation under a probe, Llama 54.9 M, {args.tokens} tokens, {args.dtype}, median of {args.rounds} rounds",
        ["prompts", "", "tokens/s", "÷ generate"],
        rows,
        device,
        write=args.save,
    )


if __name__ == "__main__":
    main()
