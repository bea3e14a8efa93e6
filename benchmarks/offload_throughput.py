"""How much of its time does a streamed step spend waiting for the link?

One model is trained in alternation in one process: resident; streamed; streamed without prefetch; and by the reference
MeZO loop on accelerate's `cpu_offload`. The bound of a streamed step is the larger of the times of the resident
step and of moving its bytes, measured here by reading and writing every block through the store with nothing else
running, on CUDA both ways at once. Files are dropped from the page cache after each read, so reads come from the
disk (of a virtual machine, whose host may cache them); writes are synced.

    python -m benchmarks.offload_throughput --tier disk --tokens 512 --save
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch
from accelerate import cpu_offload

from zo_core import ZeroOrder
from zo_core.streaming import Streaming
from zo_core.streaming.copies import Moment
from zo_core.streaming.tensor_file import Tensors

from .offload_memory import llama
from .report import save
from .rival_methods import PublishedMezo
from .timing import synchronise, timed

TIERS = {"cpu": "host memory", "disk": "disk"}


class NoPlan(dict[Any, Any]):
    """Predicts that every block follows itself, so that there is nothing to prefetch."""

    def __setitem__(self, block: Any, following: Any) -> None:
        pass


def link_seconds(streaming: Streaming) -> float:
    """Seconds for bringing every block to the device and back, with at most two there: both ways at once on CUDA."""
    streaming.flush()
    store, copies = streaming.store, streaming.copies
    synchronise(streaming.device)
    start = time.perf_counter()
    there: deque[tuple[Future[Moment], Tensors]] = deque()
    for block in streaming.blocks:
        if len(there) == 2:
            copies.wait(there.popleft()[0])
        tensors = {
            name: torch.empty(shape, dtype=dtype, device=streaming.device)
            for name, (shape, dtype) in block.specs.items()
        }
        come = copies.fetch(partial(store.read, block.name, tensors), [copies.now()])
        gone = copies.send(partial(store.write, block.name, tensors, block.specs.keys()), [come.result()])
        there.append((gone, tensors))
    for gone, _ in there:
        copies.wait(gone)
    return time.perf_counter() - start


def measure(tier: str, dtype: torch.dtype, device: torch.device, args: Any, folder: str) -> dict[str, float]:
    """Median seconds of a step of each contender, and of moving the bytes of a streamed one."""
    ids = torch.randint(0, 4096, (1, args.tokens), device=device)
    steps: dict[str, Callable[[], object]] = {}
    streamings = []
    for name in ("resident", "streamed", "no prefetch"):
        model = llama(args.layers, dtype, args.width).eval()
        settings: dict[str, Any] = {"lr": 1e-7}
        if name == "resident":
            model.to(device)
        else:
            settings |= {"offload": tier, "device": str(device)}
            settings |= {"offload_dir": f"{folder}/{name}"} if tier == "disk" else {}
        zo = ZeroOrder(model, **settings)
        steps[name] = lambda zo=zo: zo.step(lambda: zo.model(input_ids=ids, labels=ids).loss)
        if zo.streaming is not None:
            streamings.append(zo.streaming)
            if name == "no prefetch":
                zo.streaming.following = NoPlan({block: block for block in zo.streaming.blocks})
    plain = llama(args.layers, dtype, args.width).eval()
    values = {name: value.clone() for name, value in plain.state_dict().items()}
    mezo = PublishedMezo(plain)
    mezo.parameters = list({value.data_ptr(): value for value in values.values()}.values())
    cpu_offload(plain, execution_device=device, state_dict=values)
    steps["accelerate cpu_offload + MeZO"] = lambda: mezo.step(lambda: plain(input_ids=ids, labels=ids).loss)
    gc.collect()
    for run in steps.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in (*steps, "link")}
    for _ in range(args.rounds):
        for name, run in steps.items():
            times[name].append(timed(run, device))
        times["link"].append(link_seconds(streamings[0]))
    args.bytes = sum(block.nbytes for block in streamings[0].blocks)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tier", choices=TIERS, default="disk")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024, help="4096 has 201 M weights a layer, 16 times as many")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="for the block files; default: a temporary one")
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    args = parser.parse_args()
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        seconds = measure(args.tier, getattr(torch, args.dtype), device, args, folder)
    bound = max(seconds["resident"], seconds["link"])
    rows = [
        [name, f"{value:.3f}", f"{value / seconds['resident']:.2f}", "" if name == "link" else f"{bound / value:.2f}"]
        for name, value in seconds.items()
    ]
    size = args.bytes
    rate = 2 * size / seconds["link"]
    save(
        f"offload-throughput-{args.tier}-{args.tokens}tokens-{args.dtype}",
        f"Streaming from {TIERS[args.tier]}: {args.layers} layers of width {args.width}, "
        f"{size / 1e6:.0f} MB read and written a step at {rate / 1e9:.2f} GB/s, "
        f"{args.tokens} tokens, {args.dtype}; bound {bound:.3f} s; "
        f"median of {args.rounds} rounds",
        ["", "seconds", "÷ resident", "bound ÷ it"],
        rows,
        device,
        write=args.save,
    )


if __name__ == "__main__":
    main()
