"""A model whose weights are dealt out to processes (tensor parallel), trained by their shared forwards. Offline.

    torchrun --standalone --nproc_per_node 2 examples/tensor_parallel.py            # both hold parts of one model
    torchrun --standalone --nproc_per_node 4 examples/tensor_parallel.py --parts 2  # two such pairs

Each process holds half of the weights. A pair computes one forward together and counts as one process: with two pairs,
each measures a direction of its own on images of its own. The log replays on a whole model to the same bits. With
``python`` instead of torchrun, one process has all of it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that a clone works before it is installed

from zo_core import ZeroOrder
from zo_core.seedlog import SeedLogWriter, replay


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--parts", type=int, help="processes that hold one model together; default: all")
    args = parser.parse_args()
    several = "RANK" in os.environ  # set by torchrun
    model, rank, group = network(), 0, 0
    if several:
        dist.init_process_group("gloo")
        rank, size = dist.get_rank(), dist.get_world_size()
        mesh = init_device_mesh("cpu", (size // (args.parts or size), args.parts or size), mesh_dim_names=("zo", "tp"))
        model = parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        group = mesh["zo"].get_local_rank()

    data = load_digits()
    images, digits = torch.tensor(data.images, dtype=torch.float32).view(-1, 64) / 16, torch.tensor(data.target)
    generator = torch.Generator().manual_seed(group)  # the same batches within a group
    with tempfile.TemporaryDirectory() as folder:
        zo, log = ZeroOrder(model), Path(folder) / "seedlog.zo"
        if rank == 0:
            SeedLogWriter.attach(zo, log)
        for _ in range(args.steps):
            rows = torch.randint(0, len(images), (128,), generator=generator)
            zo.step(lambda: F.cross_entropy(model(images[rows]), digits[rows]))  # noqa: B023
        accuracy = float((model(images).argmax(1) == digits).float().mean())
        named = list(model.named_parameters())
        gathered = {name: getattr(parameter, "full_tensor", parameter.detach)() for name, parameter in named}
        if rank == 0:
            held = sum(getattr(parameter, "to_local", parameter.detach)().numel() for _, parameter in named)
            whole = network()
            replay(whole, log)
            equal = all(torch.equal(parameter, gathered[name]) for name, parameter in whole.named_parameters())
            print(f"weights in each process: {held:,} of {sum(p.numel() for p in whole.parameters()):,}")
            print(f"directions a step: {zo.num_probes}, accuracy after {args.steps} steps: {accuracy:.3f}")
            print(f"the log replays on one process to the same weights: {equal}")
    if several:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
