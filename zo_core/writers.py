"""Recognises by its keys which optimizer wrote a state, for checkpoints without a mark."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

#: Name of the optimizer that writes our own states.
OWN = "ZOOptimizer"
GROUP = {"lr", "eps", "weight_decay"}
#: What torch and its schedulers add to the groups of any optimizer.
ADDED = {"params", "param_names", "initial_lr", "max_lr", "min_lr", "swa_lr"}
STATE = {"momentum", "anchor", "factor", "factor_momentum", "bases", "decay", "weights"}

#: Name, keys of its groups, keys of its state. The first match counts, so more specific ones come first.
WRITERS: tuple[tuple[str, Collection[str], Collection[str]], ...] = (
    ("bitsandbytes", (), ("state1",)),
    ("bitsandbytes", (), ("__bnb_optimizer_quant_state__",)),
    ("bitsandbytes", ("betas", "t_alpha"), ()),
    ("Adafactor", ("clip_threshold", "relative_step"), ()),
    ("Adafactor", ("beta2_decay",), ()),
    ("a schedule-free optimizer", ("weight_sum", "weight_lr_power"), ()),
    ("Muon", ("ns_steps",), ()),
    ("RMSprop", ("alpha", "centered"), ()),
    ("Adagrad", ("lr_decay", "initial_accumulator_value"), ()),
    ("Adadelta", ("rho",), ()),
    ("Rprop", ("etas", "step_sizes"), ()),
    ("ASGD", ("lambd", "t0"), ()),
    ("NAdam", ("betas", "momentum_decay"), ()),
    ("AdamW or Adam", ("betas", "amsgrad"), ()),
    ("Adamax", ("betas",), ("exp_inf",)),
    ("a variant of Adam", ("betas", "eps"), ("exp_avg", "exp_avg_sq")),
    ("Lion", ("betas",), ("exp_avg",)),
    ("SGD", ("momentum", "dampening", "nesterov"), ()),
    ("SGD", (), ("momentum_buffer",)),
)


def is_own(state: Mapping[str, Any], extra: Collection[str]) -> bool:
    """Whether a state looks like one of a `ZOOptimizer`.

    Args:
        state: with ``param_groups`` and ``state``.
        extra: further keys that the user has added to groups.
    """
    groups, kept = _keys(state)
    return groups >= GROUP and groups <= GROUP | ADDED | set(extra) and kept <= STATE


def written_by(state: Mapping[str, Any]) -> str | None:
    """The usual name of the optimizer that wrote a state; None if its keys do not tell."""
    if is_own(state, ()):
        return OWN
    groups, kept = _keys(state)
    return next((name for name, ours, own in WRITERS if groups.issuperset(ours) and kept.issuperset(own)), None)


def _keys(state: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    """The keys of the groups, and of what is kept for parameters."""
    kept = (entry for entry in state["state"].values() if isinstance(entry, Mapping))
    return {key for group in state["param_groups"] for key in group}, {key for entry in kept for key in entry}
