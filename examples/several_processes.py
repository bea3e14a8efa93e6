"""One model trained by several processes, which exchange a few numbers per step and hold the same bits. Offline.

    torchrun --standalone --nproc_per_node 2 examples/several_processes.py
    torchrun --standalone --nproc_per_node 2 examples/several_processes.py --mode data

A classifier of scikit-learn's digits is adapted to digits that are shifted by one pixel. Each process has a part of the
images. With ``python`` instead of torchrun, one process has all of them.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that a clone works before it is installed

from zo_core import ZeroOrder


def trained_normally(images: Tensor, digits: Tensor) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(model(images), digits).backward()
        optimizer.step()
    return model


def same_everywhere(model: nn.Module) -> bool:
    """Whether all processes hold the same weights, bit for bit."""
    weights = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
    found = [torch.empty_like(weights) for _ in range(dist.get_world_size())]
    dist.all_gather(found, weights)
    return all(torch.equal(each, found[0]) for each in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--mode", choices=["directions", "data"], default="directions")
    args = parser.parse_args()
    several = "RANK" in os.environ  # set by torchrun
    if several:
        dist.init_process_group("gloo")
    rank, size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)

    data = load_digits()
    images, digits = torch.tensor(data.images, dtype=torch.float32).view(-1, 64) / 16, torch.tensor(data.target)
    model = trained_normally(images, digits)
    shifted = images.view(-1, 8, 8).roll(1, dims=2).reshape(-1, 64)
    mine, wanted = shifted[rank::size], digits[rank::size]

    def accuracy() -> float:
        return float((model(shifted).argmax(1) == digits).float().mean())

    before = accuracy()
    zo = ZeroOrder(model, ranks=args.mode)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(args.steps):
        rows = torch.randint(0, len(mine), (128,), generator=generator)
        zo.step(lambda: F.cross_entropy(model(mine[rows]), wanted[rows]))  # noqa: B023
    if rank == 0:
        print(f"processes: {size}, directions a step: {zo.num_probes}, accuracy {before:.3f}, then {accuracy():.3f}")
    if several:
        equal = same_everywhere(model)
        if rank == 0:
            print(f"all processes hold the same weights: {equal}")
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
