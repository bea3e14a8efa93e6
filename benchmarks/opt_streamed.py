"""How much time and memory does a streamed step of an OPT-shaped model take on a GPU?

The models have OPT's published shapes and random values, made on the device. Per model, in one process: two plain
forwards, our step and the reference MeZO loop with everything resident; then our step streamed from host
memory. The bound of a streamed step is the larger of the times of the resident step and of moving the bytes of
its blocks, once in and once out, both ways at once, measured with nothing else running.

    python -m benchmarks.opt_streamed --sizes 1.3b 6.7b 13b --save
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import OPTConfig, OPTForCausalLM

from zo_core import ZeroOrder

from .link import link_rates
from .report import save
from .rival_methods import PublishedMezo
from .timing import timed

#: Layers, hidden size and heads. "tiny" is for trying the benchmark out where there is no GPU.
SHAPES = {
    "tiny": (3, 64, 4),
    "1.3b": (24, 2048, 32),
    "2.7b": (32, 2560, 32),
    "6.7b": (32, 4096, 32),
    "13b": (40, 5120, 40),
    "30b": (48, 7168, 56),
}


def opt(size: str, dtype: torch.dtype, device: torch.device, layers: int | None) -> OPTForCausalLM:
    depth, hidden, heads = SHAPES[size]
    config = OPTConfig(
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=4 * hidden,
        num_attention_heads=heads,
        num_hidden_layers=layers or depth,
        max_position_embeddings=2048,
        vocab_size=50272 if size != "tiny" else 512,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            return OPTForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def median_seconds(run: Callable[[], object], rounds: int, device: torch.device) -> float:
    run()
    return statistics.median(timed(run, device) for _ in range(rounds))


def peak_gb(run: Callable[[], object], device: torch.device) -> float:
    """Peak device memory of tensors during a call, in GB."""
    if device.type != "cuda":
        run()
        return float("nan")
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 1e9


def measure(size: str, device: torch.device, args: Any) -> list[list[str]]:
    """A row for every contender: name, seconds, as a multiple of two forwards, peak of device memory."""
    dtype = getattr(torch, args.dtype)
    model = opt(size, dtype, device, args.layers)
    ids = torch.randint(0, model.config.vocab_size, (1, args.tokens), device=device)

    def loss() -> torch.Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss  # as trainers do

    @torch.no_grad()
    def two_forwards() -> float:
        return float(loss()) + float(loss())

    seconds: dict[str, float] = {}
    memory: dict[str, float] = {}

    def contend(name: str, run: Callable[[], object]) -> None:
        seconds[name] = median_seconds(run, args.rounds, device)
        memory[name] = peak_gb(run, device)

    contend("two forwards, resident", two_forwards)
    contend("zo step, resident", partial(ZeroOrder(model, lr=1e-7, rule=args.rule, noise=args.noise).step, loss))
    contend("MeZO as published, resident", partial(PublishedMezo(model).step, loss))
    model.to("cpu")
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    streamed = ZeroOrder(model, lr=1e-7, rule=args.rule, noise=args.noise, offload="cpu", device=str(device))
    contend("zo step, streamed", lambda: streamed.step(loss))
    assert streamed.streaming is not None
    size_bytes = sum(block.nbytes for block in streamed.streaming.blocks)
    if args.profile:
        profile(lambda: streamed.step(loss), size)
    streamed.close("cpu")
    rates = link_rates(device)
    seconds["link, both ways at once"] = 2 * size_bytes / rates["both ways, together"]
    bound = max(seconds["zo step, resident"], seconds["link, both ways at once"])
    rows = []
    for name, value in seconds.items():
        peak = f"{memory[name]:.2f}" if name in memory else ""
        share = f"{bound / value:.2f}" if name == "zo step, streamed" else ""
        rows.append([size, name, f"{value:.4f}", f"{value / seconds['two forwards, resident']:.2f}", share, peak])
    return rows


def profile(run: Callable[[], object], size: str) -> None:
    """Prints where one step spends its time, all threads included."""
    from torch._C._profiler import _ExperimentalConfig
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profiled(activities=activities, experimental_config=_ExperimentalConfig(profile_all_threads=True)) as seen:
        run()
    averages = seen.key_averages()
    for key in [f"self_{activity.name.lower()}_time_total" for activity in activities]:
        print(f"{size}, one streamed step by {key}:")
        print(averages.table(sort_by=key, row_limit=20, max_name_column_width=60))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=["1.3b", "6.7b"])
    parser.add_argument("--layers", type=int, help="instead of the model's own number of layers")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rule", default="sgd")
    parser.add_argument("--noise", default="rademacher")
    parser.add_argument("--profile", action="store_true", help="print where one streamed step spends its time")
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    args = parser.parse_args()
    device = torch.device(args.device)
    for size in args.sizes:
        rows = measure(size, device, args)
        save(
            f"opt-streamed-{size}-{args.rule}-{args.noise}-{args.dtype}",
            f"OPT-{size}, {args.layers or SHAPES[size][0]} layers, {args.tokens} tokens, {args.dtype}, "
            f"{args.rule}, {args.noise}; median of {args.rounds} steps",
            ["model", "", "seconds", "÷ two forwards", "bound ÷ it", "peak device memory, GB"],
            rows,
            device,
            write=args.save,
        )


if __name__ == "__main__":
    main()
