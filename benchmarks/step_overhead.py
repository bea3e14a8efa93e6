"""How much longer is a zeroth-order step than the two forwards in it?

Side by side in one run, interleaved so that a noisy machine disturbs all alike, medians over the
rounds (on a CPU of the processor's time): two plain forwards; our step, per backend; and MeZO as
published (arXiv 2305.17333, algorithm 1: perturb in place by +1, -2, +1, update; `torch.normal`
reseeded for each pass).

    python -m benchmarks.step_overhead --dtype float32 --save

Passes over the weights (read or written once counts one): ours reads the weights and writes scratch
for each of the two probes, and reads and writes them for the update: 6. MeZO reads and writes them
four times, and generates a fresh normal tensor each time, written and read: 16.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from zo_core import ZeroOrder

from .report import save
from .rival_methods import PublishedMezo
from .timing import clock_of, medians, unit_of


def llama_60m() -> LlamaConfig:
    """A Llama of 54.9 M parameters, embeddings tied."""
    return LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=12,
        num_attention_heads=8,
        vocab_size=32000,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )


def measure(
    dtype: torch.dtype, device: torch.device, tokens: int, rounds: int, backends: list[str]
) -> dict[str, float]:
    """Median seconds of each contender."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_60m()).to(device, dtype).eval()
    ids = torch.randint(0, 32000, (1, tokens), device=device)

    def loss() -> torch.Tensor:
        return model(input_ids=ids, labels=ids).loss

    @torch.no_grad()
    def two_forwards() -> float:
        return float(loss()) + float(loss())

    contenders: dict[str, Callable[[], object]] = {"two forwards": two_forwards}
    for backend in backends:
        zo = ZeroOrder(model, lr=1e-7, eps=1e-3, backend=backend)
        contenders[f"zo step ({backend})"] = lambda zo=zo: zo.step(loss)
    mezo = PublishedMezo(model)
    contenders["MeZO as published"] = lambda: mezo.step(loss)
    for run in contenders.values():
        run()
    return medians(contenders, rounds, device, clock_of(device))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--backends", nargs="+", help='default: "eager", and on CUDA "auto", which is Triton')
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    args = parser.parse_args()
    device = torch.device(args.device)
    backends = args.backends or (["eager", "auto"] if device.type == "cuda" else ["eager"])
    seconds = measure(getattr(torch, args.dtype), device, args.tokens, args.rounds, backends)
    base = seconds["two forwards"]
    rows = [[name, f"{value:.3f}", f"{value / base:.2f}"] for name, value in seconds.items()]
    save(
        f"step-overhead-llama55m-{args.dtype}",
        f"Step overhead, Llama 54.9 M, {args.tokens} tokens, {args.dtype}, median of {args.rounds} interleaved rounds",
        ["", unit_of(device), "÷ two forwards"],
        rows,
        device,
        write=args.save,
    )


if __name__ == "__main__":
    main()
