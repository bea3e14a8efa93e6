"""A loop on accelerate, with one model on several processes. Offline.

    accelerate launch --multi_gpu --num_processes 2 examples/accelerate_loop.py
    accelerate launch --multi_gpu --num_processes 2 examples/accelerate_loop.py --cpu     # without GPUs, too

accelerate starts the processes and deals out the data, so that all have the same number of batches. The model is not
prepared: that would wrap it for gradients, and there are none.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    accelerator = Accelerator(cpu=args.cpu)

    data = load_digits()
    images, digits = torch.tensor(data.images, dtype=torch.float32).view(-1, 64) / 16, torch.tensor(data.target)
    model = trained_normally(images, digits).to(accelerator.device)
    shifted = images.view(-1, 8, 8).roll(1, dims=2).reshape(-1, 64)
    loader = accelerator.prepare(DataLoader(TensorDataset(shifted, digits), batch_size=64, shuffle=True))

    def accuracy() -> float:
        """Of all rows, of which each process sees its part."""
        right = [accelerator.gather_for_metrics((model(rows).argmax(1) == wanted).float()) for rows, wanted in loader]
        return float(torch.cat(right).mean())

    before = accuracy()
    zo = ZeroOrder(model)
    for _ in range(args.epochs):
        for rows, wanted in loader:
            zo.step(lambda: F.cross_entropy(model(rows), wanted))  # noqa: B023
    after = accuracy()
    weights = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
    found = accelerator.gather(weights).view(accelerator.num_processes, -1)
    accelerator.print(f"{accelerator.num_processes} processes, {zo.num_probes} directions a step")
    accelerator.print(f"accuracy {before:.3f}, then {after:.3f}")
    accelerator.print(f"all processes hold the same weights: {all(torch.equal(each, found[0]) for each in found)}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
