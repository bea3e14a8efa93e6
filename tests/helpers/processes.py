"""Several processes with a gloo group, each a fork of this one, which has everything imported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Raised:
    """An exception of a process: these need not survive pickling."""

    kind: type[BaseException]
    text: str


def together(
    work: Callable[[int], Any], folder: Path, size: int = 2, seconds: float = 120, timeout: float = 60
) -> list[Any]:
    """Runs a function in several processes at once.

    Args:
        work: called with the rank; what it returns has to be something that `torch.save` writes.
        folder: for the meeting of the processes, and their results.
        size: number of processes.
        seconds: all of them are killed after this time.
        timeout: seconds for which the process group waits for one of them.

    Returns:
        What each returned; a `Raised`, if it raised something; None if it was killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    children = [_forked(work, folder, rank, size, timeout) for rank in range(size)]
    deadline = time.monotonic() + seconds
    left = set(children)
    try:
        while left and time.monotonic() < deadline:
            left -= {child for child in left if os.waitpid(child, os.WNOHANG)[0]}
            time.sleep(0.01)
        assert not left, f"{len(left)} of {size} processes did not end in {seconds} s"
    finally:
        for child in left:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    files = [folder / f"rank{rank}.pt" for rank in range(size)]
    return [torch.load(file, weights_only=False) if file.exists() else None for file in files]


def torchrun(script: Path, folder: Path, *options: str) -> None:
    """Runs a script from tests/helpers with a folder as its argument, in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[2])}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else restarted processes may find addresses of dead ones
    how: dict[str, Any] = {"env": environment, "capture_output": True, "text": True, "timeout": 400}
    done = subprocess.run([*command, str(script), str(folder)], **how)
    assert done.returncode == 0, done.stderr[-4000:]


def _forked(work: Callable[[int], Any], folder: Path, rank: int, size: int, timeout: float) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        meeting = f"file://{folder}/meeting"
        dist.init_process_group(
            "gloo", init_method=meeting, rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
        )
        try:
            found: Any = work(rank)
        except BaseException as error:
            traceback.print_exc()
            found = Raised(type(error), str(error))
        torch.save(found, folder / f"rank{rank}.new")
        (folder / f"rank{rank}.new").rename(folder / f"rank{rank}.pt")
        code = 0
    finally:
        os._exit(code)
