"""Two facts behind the design, on a million weights of standard deviation 0.02 and normal directions.

How many weights differ after they were perturbed in place by +1, -2, +1 times eps = 1e-3 and thereby
"restored"; and how many move at all when lr * g = 1e-6 is subtracted and rounded to nearest.

    python -m benchmarks.drift
"""

from __future__ import annotations

import torch


def main() -> None:
    torch.manual_seed(0)
    values, direction = torch.randn(1 << 20) * 0.02, torch.randn(1 << 20)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        weights, z = values.to(dtype), direction.to(dtype)
        restored = weights.clone()
        for scale in (1e-3, -2e-3, 1e-3):
            restored.add_(z, alpha=scale)
        updated = weights.clone().add_(z, alpha=-1e-6)
        differ, moved = ((other != weights).float().mean() for other in (restored, updated))
        print(f"{dtype}: {differ:.1%} differ after +1, -2, +1; {moved:.1%} moved by the update")


if __name__ == "__main__":
    main()
