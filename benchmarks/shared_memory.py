"""How much host memory do the streamed layers of several processes take on one host?

Each process builds the same Llama, streams it from host memory and trains it for a few steps. Then every process reads
its proportional set size (PSS: a page that n processes have counts 1/n for each): that of the streamed layers, and that
of the whole process, above what it had with everything imported.

    python -m benchmarks.shared_memory --save
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from zo_core import ZeroOrder
from zo_core.streaming import Streaming, shared

from .offload_memory import llama
from .report import save

MB = 1e6
STEPS = 4


def proportional(addresses: list[tuple[int, int]] | None = None) -> float:
    """PSS of this process in bytes, or of the pieces of memory that begin at an address and have a size."""
    found, size, inside = 0.0, 1, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            begin, end = (int(word, 16) for word in first.split("-"))
            size = end - begin
            inside = size if addresses is None else sum(max(0, min(end, b + n) - max(begin, b)) for b, n in addresses)
        elif first == "Pss:":
            found += int(rest[0]) * 1024 * inside / size
    return found


def worker(options: argparse.Namespace) -> dict[str, float]:
    """A short run; the memory of this process at its end."""
    if not options.shared:
        setattr(shared, "host", lambda: None)  # noqa: B010
    if options.ranks > 1:
        meeting = f"file://{options.meeting}"
        dist.init_process_group("gloo", init_method=meeting, rank=options.rank, world_size=options.ranks)
    before = proportional()
    model = llama(options.layers, torch.float32, options.width)
    zo = ZeroOrder(model, lr=1e-6, rule=options.rule, offload="cpu")
    ids = torch.randint(0, 4096, (1, 64), generator=torch.Generator().manual_seed(options.rank))
    begun = 0.0
    for step in range(STEPS):
        if step == 1:
            begun = time.perf_counter()
        zo.step(lambda: model(input_ids=ids, labels=ids).loss)
    seconds = (time.perf_counter() - begun) / (STEPS - 1)
    zo.flush()
    gc.collect()
    zo.exchange.average([0.0])  # all of them are here
    streaming = Streaming.of(model)
    assert streaming is not None
    held = [tensor for block in streaming.blocks for tensor in streaming.stored(block).values()]
    blocks = proportional([(tensor.data_ptr(), tensor.nbytes) for tensor in held])
    whole = proportional() - before
    zo.exchange.average([0.0])
    return {"blocks": blocks, "whole": whole, "seconds": seconds, "size": float(sum(t.nbytes for t in held))}


def together(ranks: int, sharing: bool, options: argparse.Namespace) -> dict[str, float]:
    """The memory of all processes of a run, summed, and the seconds of a step."""
    with tempfile.TemporaryDirectory() as folder:
        how = [f"--layers={options.layers}", f"--width={options.width}", f"--rule={options.rule}", f"--ranks={ranks}"]
        how += [f"--meeting={folder}/meeting", *(["--shared"] if sharing else [])]
        command = [sys.executable, "-m", "benchmarks.shared_memory", *how]
        runs = [subprocess.Popen([*command, f"--rank={r}"], stdout=subprocess.PIPE, text=True) for r in range(ranks)]
        outputs = [run.communicate()[0] for run in runs]
    found = [json.loads(output.splitlines()[-1]) for output in outputs]
    summed = {name: sum(each[name] for each in found) / MB for name in ("blocks", "whole")}
    return {**summed, "seconds": max(each["seconds"] for each in found), "size": found[0]["size"] / MB}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rule", default="momentum")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--meeting")
    parser.add_argument("--shared", action="store_true")
    options = parser.parse_args()
    if options.rank is not None:
        torch.set_num_threads(1)
        print(json.dumps(worker(options)))
        return
    rows: list[list[str]] = []
    first: dict[str, float] = {}
    for ranks, sharing in ((1, False), (options.ranks, False), (options.ranks, True)):
        found = together(ranks, sharing, options)
        first = first or found
        rows.append(
            [
                str(ranks),
                "one" if sharing else "of each process",
                *(f"{found[name]:.0f} ({found[name] / first[name]:.2f})" for name in ("blocks", "whole")),
                f"{found['seconds']:.2f}",
            ]
        )
    title = f"Host memory of {first['size']:.0f} MB of streamed layers ({options.rule}), summed over the processes"
    columns = ["processes", "copy", "layers, MB", "all above the imports, MB", "seconds a step"]
    save("shared-memory", title, columns, rows, torch.device("cpu"), write=options.save)


if __name__ == "__main__":
    main()
