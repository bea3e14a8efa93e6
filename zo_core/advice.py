"""Advice that is logged once before a run, in any trainer."""

from __future__ import annotations

from .engine import ZeroOrder
from .lr_range import base_rates

#: Above these learning rates a run with SPSA and plain updates usually diverges. The limit for full fine-tuning
#: holds for this many parameters; for smaller models it is proportionally higher.
LARGE = 10_000_000
MAX_LR_FULL = 1e-5
MAX_LR_PEFT = 1e-2


def lr_advice(engine: ZeroOrder, name: str) -> str | None:
    """A warning if the learning rate is probably meant for backpropagation, else None.

    Args:
        engine: the engine that is about to train.
        name: what the user calls the learning rate.
    """
    if engine.estimator.name != "spsa" or engine.rule.name not in ("sgd", "momentum") or engine.wants_lr:
        return None
    trained = sum(slot.tensor.numel() for slot in engine.slots)
    peft = trained < 0.1 * sum(p.numel() for p in engine.model.parameters())
    full = MAX_LR_FULL * max(1.0, LARGE / trained)
    limit, sensible = (MAX_LR_PEFT, "5e-5 to 1e-4") if peft else (full, "1e-7 to 1e-6")
    lr = max(base_rates(engine.optimizer))
    if lr <= limit:
        return None
    method = "training of adapters" if peft else "full fine-tuning"
    return f"{name}={lr:g} is in the range for backpropagation; zeroth-order {method} usually needs {sensible}"
