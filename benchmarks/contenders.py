"""Ways to learn from forwards: what moves, along which directions, and how many of them a step measures.

A forward is one run of the model on a whole batch. A contender that splits its batch measures other directions on
each part, so that its forwards count in proportion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zo_core import Es, LowRank, Probe, ZeroOrder, ZOConfig
from zo_core.normaliser import Curvature

from . import masks, rival_methods, subspaces
from .activation_windows import Along
from .rival_methods import Start, Step, at
from .tasks import Batch, Task
from .text_tasks import in_nf4, with_adapters

Wrap = Callable[[Task], Task]


@dataclass(frozen=True)
class Contender:
    """A way to learn.

    Attributes:
        wrap: makes the task's model what moves; None for all weights.
        settings: fields of `ZOConfig`.
        split: parts of a batch, each of which has a direction of its own.
        apart: whether each part is a step of its own.
        start: makes another step, in place of `ZeroOrder`.
        forwards: how many such a step takes.
        decay: forwards at which a linear decay of the rate ends; 0 keeps the rate.
    """

    wrap: Wrap | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    split: int = 1
    apart: bool = False
    start: Start | None = None
    forwards: int = 1
    decay: int = 0


# What moves


def lora(task: Task) -> Task:
    """LoRA of rank 8 as PEFT sets it up on all linear layers, and a new head."""
    from peft import LoraConfig

    return with_adapters(task, "lora", 1e-2, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", **head(task)))


def qlora(task: Task) -> Task:
    """LoRA on a base that is quantised to nf4."""
    return lora(in_nf4(task))


def activations(rank: int = 8, whiten: float = 1.0) -> Wrap:
    def wrap(task: Task) -> Task:
        from hf_zo.activations import activation_adapter

        batches = [task.data(700_000_000 + index)[0] for index in range(4)]
        return replace(task, model=activation_adapter(task.model, batches, rank, whiten=whiten, **head(task)))

    return wrap


def activations_and_vectors(task: Task) -> Task:
    """The adapter along the activations, and biases and the weights of norms."""
    task = activations()(task)
    for parameter in task.model.parameters():
        if parameter.ndim == 1:
            parameter.requires_grad_(True)
    return task


def signs(task: Task) -> Task:
    """The same adapter with random directions."""
    from hf_zo import low_rank_adapter

    return replace(task, model=low_rank_adapter(task.model, 8, **head(task)))


def head(task: Task) -> dict[str, Any]:
    names = [name for name, _ in task.model.named_children() if name in ("classifier", "score")]
    return {"modules_to_save": names, "exclude_modules": names} if names else {}


def vectors(task: Task) -> Task:
    """Only biases, the weights of norms, and a new head."""
    for name, parameter in task.model.named_parameters():
        parameter.requires_grad_(parameter.ndim == 1 or name.startswith(("classifier", "score")))
    return task


def linear(task: Task) -> Task:
    """Only the matrices of linear layers that are not tied to an embedding, and a new head."""
    layers = [*task.model.modules()]
    tied = {id(layer.weight) for layer in layers if isinstance(layer, nn.Embedding)}
    kept = {id(layer.weight) for layer in layers if isinstance(layer, nn.Linear)} - tied
    for name, parameter in task.model.named_parameters():
        parameter.requires_grad_(id(parameter) in kept or name.startswith(("classifier", "score")))
    return task


# Runs


@dataclass
class OfFirst(Curvature):
    """The curvature along the first direction alone, since each has a part of the batch of its own."""

    def see(self, step: int, probes: tuple[Probe, ...], losses: Sequence[float], eps: float) -> None:
        super().see(step, probes, (*losses[:2], losses[-1]) if self.counts(step) else losses, eps)


class Trainer:
    """Steps of a contender.

    Args:
        contender: what to do.
        task: its model is changed.
        power: the rate, as a power of 2 times the default.
        seed: of the directions.

    Attributes:
        forwards: how many have been spent, in whole batches.
        model: the one that learns.
    """

    def __init__(self, contender: Contender, task: Task, power: float, seed: int):
        self.contender, self.forwards = contender, 0.0
        torch.manual_seed(seed)
        self.task = task = task if contender.wrap is None else contender.wrap(task)
        self.model: nn.Module = task.model
        self.zo: ZeroOrder | None = None
        self.other: Step | None = None
        if contender.start is not None:
            self.other = contender.start(self.model, power, seed)
        else:
            self.zo = self._engine(contender.settings, power, seed)

    def _engine(self, settings: dict[str, Any], power: float, seed: int) -> ZeroOrder:
        config = ZOConfig(**{"seed": seed, "brake": None, **settings})
        zo = ZeroOrder(self.model, config)
        zo.first_steps = None  # they would measure a point twice
        if self.contender.split > 1 and not self.contender.apart:
            assert isinstance(zo.normaliser, Curvature)
            zo.normaliser = OfFirst(size=zo.normaliser.size)
        zo.lr = self.lr = zo.lr * 2.0**power
        return zo

    def step(self, batch: Batch) -> float:
        """Learns from a batch; returns its loss."""
        if self.other is not None:
            self.forwards += self.contender.forwards
            return self.other(lambda: self.task.loss(self.model, batch))
        parts = list(zip(*(column.chunk(self.contender.split) for column in batch), strict=True))
        if self.contender.apart:
            return sum(self._step([part]) for part in parts) / len(parts)
        return self._step(parts)

    def _step(self, parts: Sequence[Batch]) -> float:
        assert self.zo is not None
        if self.contender.decay:
            self.zo.lr = self.lr * max(0.0, 1.0 - self.forwards / self.contender.decay)
        split, calls = len(parts), 0
        count = self.zo.num_probes

        def closure() -> Tensor:
            nonlocal calls
            direction = calls // 2 if calls < 2 * count else 0  # the normaliser's point is of the first one
            calls += 1
            return self.task.loss(self.model, parts[direction if split > 1 else 0])

        if isinstance(self.zo.noise, Along):
            self.zo.noise.look(self.zo, closure)
        loss = float(self.zo.step(closure))
        self.forwards += calls / self.contender.split
        return loss


SMALL: dict[str, Any] = {"split": 4, "apart": True}
ONE_SIDED: dict[str, Any] = {"estimator": Es(shaping="center"), "num_probes": 8, "normalise": "curvature"}

ADAMW = at(1e-3, rival_methods.adamw)


def subspace(**settings: Any) -> Contender:
    """An experiment in random subspaces; the momentum's directions are normal."""
    base = 1e-3 if settings.get("muon") or settings.get("even") else 1e-5
    start = at(base, partial(subspaces.Subspace, **settings))
    return Contender(start=start, forwards=2 * settings.get("count", 1))


def hizoo(smooth: float) -> Contender:
    return Contender(start=at(1e-5, partial(subspaces.HizooL, smooth=smooth)), forwards=3)


def masked(how: str) -> Contender:
    """An experiment with directions in a quarter of the weights."""
    return Contender(start=at(1e-5, partial(masks.Masked, how=how)), forwards=2)


#: What one would use instead of forward passes, and what others publish.
RIVALS: dict[str, Contender] = {
    "published-mezo": Contender(start=at(1e-5, rival_methods.published_mezo), forwards=2),
    "zo-adam": Contender(start=at(1e-4, rival_methods.zo_adam), forwards=2),
    "adamw-qlora": Contender(qlora, start=ADAMW),
    "galore": Contender(start=at(1e-3, rival_methods.galore)),
    "apollo": Contender(start=at(1e-3, rival_methods.apollo)),
    "blockwise": Contender(start=at(1e-3, rival_methods.blockwise)),
    "sgd-in-backward": Contender(start=at(1e-2, rival_methods.in_backward)),
}

#: Experiments; see docs/tried.md.
TRIED: dict[str, Contender] = {
    "subspace": subspace(),
    "subspace-4": subspace(rank=8, count=4),
    "subspace-even": subspace(even=True),
    "zo-muon": subspace(muon=True),
    "zo-muon-4": subspace(rank=8, count=4, muon=True),
    "subzero": subspace(rank=8, both=True),
    "subzero-no-momentum": subspace(rank=8, both=True, beta=0.0),
    **{f"mask-{how}": masked(how) for how in ("all", "random", "small", "grasp", "ratios", "gradient")},
    "hizoo-l": hizoo(1e-6),
    "hizoo-l-faster": hizoo(1e-4),
    "low-rank-8": Contender(settings={"noise": LowRank(8)}),
    "low-rank-8-along": Contender(settings={"noise": Along(8)}),
    "low-rank-8-along-plain": Contender(settings={"noise": Along(8, whiten=0.0)}),
    "linear-8": Contender(linear, {"noise": LowRank(8)}),
    "linear-8-along": Contender(linear, {"noise": Along(8)}),
    "activations-decay": Contender(activations(), decay=240),
    "activations-32": Contender(activations(32)),
    "activations-32-decay": Contender(activations(32), decay=240),
    "linear-8-along-kept": Contender(linear, {"noise": Along(8, None)}),
}

#: Those that matter most come first: a run that ends early leaves out the last.
ALL: dict[str, Contender] = {
    "mezo": Contender(),
    "activations-one-sided-small": Contender(activations(), ONE_SIDED, **SMALL),
    "one-sided-small": Contender(settings=ONE_SIDED, **SMALL),
    "vectors-one-sided-small": Contender(vectors, ONE_SIDED, **SMALL),
    "activations": Contender(activations()),
    "small-batches": Contender(**SMALL),
    "lora": Contender(lora),
    "adamw": Contender(start=ADAMW),
    "fzoo": Contender(settings={"estimator": "fzoo", "normalise": False}),  # as published
    "lozo": Contender(settings={"noise": "low_rank"}),
    "lozo-momentum": Contender(settings={"noise": "low_rank", "rule": "momentum"}),
    "vectors": Contender(vectors),
    "activations-one-sided": Contender(activations(), ONE_SIDED),
    "one-sided": Contender(settings=ONE_SIDED),
    "signs": Contender(signs),
    "directions": Contender(settings={"num_probes": 4}, split=4),
    "activations-and-vectors": Contender(activations_and_vectors),
    "activations-and-vectors-one-sided-small": Contender(activations_and_vectors, ONE_SIDED, **SMALL),
    "adamw-lora": Contender(lora, start=ADAMW),
    "activations-plain": Contender(activations(whiten=0.0)),
    "activations-2": Contender(activations(2)),
    "activations-half": Contender(activations(whiten=0.5)),
    "activations-1": Contender(activations(1)),
    "momentum": Contender(settings={"rule": "momentum"}),
    "mezo-8": Contender(settings={"num_probes": 8}),
    "conservative": Contender(settings={"estimator": "conservative"}),
}
EVERY: dict[str, Contender] = {**ALL, **RIVALS, **TRIED}
