"""Masks and sampled blocks against all weights at once on the learning gate, at equal forwards.

The task and the rates are those of `benchmarks.low_rank_learning`, plus a larger rate: if fewer elements
move, larger rates may be better.

    python -m benchmarks.sparse_learning --save
"""

from __future__ import annotations

from .low_rank_learning import RATES, compare

NOISES: dict[str, object] = {
    "rademacher": "rademacher",
    "sparse(0.25)": {"name": "sparse", "quantile": 0.25},
    "sampled(0.5)": {"name": "sampled", "share": 0.5},
}


def main() -> None:
    compare("sparse-learning", NOISES, (*RATES, 3e-3))


if __name__ == "__main__":
    main()
