"""A run for `torchrun --max-restarts 2`: rank 1 is killed in the first life of the processes, rank 0 in the second."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import hf_ranks
import torch


class Killed(hf_ranks.Ordered):
    """Is killed while it measures a step."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        life, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), self.args.process_index
        if (life, rank, self.state.global_step) in {(0, 1, 2), (1, 0, 4)}:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().compute_loss(*args, **kwargs)


def main(folder: Path) -> None:
    again = int(os.environ["TORCHELASTIC_RESTART_COUNT"]) > 0
    found = hf_ranks.train(folder, cls=Killed, resume=again)
    torch.save(found["state"], folder / f"rank{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
