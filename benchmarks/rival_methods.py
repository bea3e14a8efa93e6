"""Ways to train that are not `ZeroOrder`'s own: with gradients, and MeZO as published.

Each takes a model, a rate and a seed, and returns a step: a function of the closure that computes the loss.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zo_core import ZeroOrder

Loss = Callable[[], Tensor]
Step = Callable[[Loss], float]
Start = Callable[[nn.Module, float, int], Step]


def moving(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The transformer's layers: the longest list of modules."""
    return max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)


def descend(optimizer: torch.optim.Optimizer) -> Step:
    """Backpropagation and a step of the optimizer."""

    def step(loss: Loss) -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        return value.item()

    return step


def adamw(model: nn.Module, rate: float, seed: int) -> Step:
    return descend(torch.optim.AdamW(moving(model), lr=rate))


def checkpointed(model: nn.Module, rate: float, seed: int, start: Start = adamw) -> Step:
    """Activations are computed again in the backward pass; a model without dropout trains in training mode."""
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()  # type: ignore[operator]
    model.train()
    return start(model, rate, seed)


def in_backward(model: nn.Module, rate: float, seed: int) -> Step:
    """SGD that moves a weight as soon as its gradient is there, and drops that (LOMO, arXiv 2306.09782)."""

    def move(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.data.add_(parameter.grad, alpha=-rate)
        parameter.grad = None

    for parameter in moving(model):
        parameter.register_post_accumulate_grad_hook(move)

    def step(loss: Loss) -> float:
        value = loss()
        value.backward()
        return value.item()

    return step


class Blockwise:
    """AdamW for one layer at a time, and for a head outside the layers (as BAdam, 2404.02827, and LISA, 2403.17919).

    Args:
        model: frozen but for the layer of the moment, and for modules called classifier or score.
        rate: learning rate.
        seed: of the order of the layers.
        every: steps after which another layer is taken, with an optimizer of its own.
    """

    def __init__(self, model: nn.Module, rate: float, seed: int, every: int = 20):
        self.layers, self.rate, self.every, self.done = list(layers_of(model)), rate, every, 0
        self.order = random.Random(seed)
        self.always = [p for n, p in model.named_parameters() if n.startswith(("classifier", "score"))]
        model.requires_grad_(False)
        self.next: list[nn.Module] = []

    def turn(self) -> None:
        for layer in self.layers:
            layer.requires_grad_(False)
            for parameter in layer.parameters():
                parameter.grad = None
        if not self.next:
            self.next = self.order.sample(self.layers, len(self.layers))
        parameters = [*self.next.pop().parameters(), *self.always]
        for parameter in parameters:
            parameter.requires_grad_(True)
        self.step = descend(torch.optim.AdamW(parameters, lr=self.rate))

    def __call__(self, loss: Loss) -> float:
        if self.done % self.every == 0:
            self.turn()
        self.done += 1
        return self.step(loss)


def blockwise(model: nn.Module, rate: float, seed: int) -> Step:
    return Blockwise(model, rate, seed)


def _projected(model: nn.Module, **settings: Any) -> list[dict[str, Any]]:
    """Parameter groups: the matrices in layers are projected, the rest is not."""
    inside = {id(p) for layer in layers_of(model) for p in layer.parameters() if p.ndim == 2}
    return [
        {"params": [p for p in moving(model) if id(p) not in inside]},
        {
            "params": [p for p in moving(model) if id(p) in inside],
            "update_proj_gap": 50,
            "proj_type": "std",
            **settings,
        },
    ]


def galore(model: nn.Module, rate: float, seed: int) -> Step:
    """AdamW on gradients of rank 32 (GaLore, arXiv 2403.03507), of the package galore-torch."""
    from galore_torch import GaLoreAdamW

    return descend(GaLoreAdamW(_projected(model, rank=32, scale=1.0), lr=rate, no_deprecation_warning=True))


def apollo(model: nn.Module, rate: float, seed: int) -> Step:
    """AdamW's scaling taken from gradients of rank 32 (APOLLO, arXiv 2412.05270), of the package apollo-torch."""
    from apollo_torch import APOLLOAdamW

    random_projection = {"proj": "random", "scale_type": "channel", "rank": 32, "scale": 1.0}
    return descend(APOLLOAdamW(_projected(model, **random_projection), lr=rate))


def zero_offload(model: nn.Module, rate: float, seed: int) -> Step:
    """AdamW whose state is on the host (ZeRO-Offload, arXiv 2101.06840), of the package deepspeed, by one process."""
    os.environ.update(DS_ACCELERATOR="cpu", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")  # read when it is imported
    import deepspeed

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": rate}},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    }
    engine, *_ = deepspeed.initialize(model=model, config=config, dist_init_required=False)

    def step(loss: Loss) -> float:
        value = loss()
        engine.backward(value)
        engine.step()
        return value.item()

    return step


class PublishedMezo:
    """MeZO's step as in its paper (arXiv 2305.17333, algorithm 1): in place, from a reseeded global generator."""

    def __init__(self, model: nn.Module, lr: float = 1e-7, eps: float = 1e-3, seed: int = 0):
        self.parameters = moving(model)
        self.lr, self.eps, self.seed = lr, eps, 1_000_000 * seed

    def _move(self, scale: float) -> None:
        torch.manual_seed(self.seed)
        for p in self.parameters:
            z = torch.normal(mean=0, std=1, size=p.shape, device=p.device, dtype=p.dtype)
            p.data.add_(z, alpha=scale)

    @torch.no_grad()
    def step(self, loss: Loss) -> float:
        self.seed += 1
        self._move(self.eps)
        plus = float(loss())
        self._move(-2 * self.eps)
        minus = float(loss())
        self._move(self.eps)
        self._move(-self.lr * (plus - minus) / (2 * self.eps))
        return plus


def published_mezo(model: nn.Module, rate: float, seed: int) -> Step:
    return PublishedMezo(model, rate, seed=seed).step


def packaged_mezo(model: nn.Module, rate: float, seed: int) -> Step:
    """The step of the package mezo 0.0.1."""
    from mezo.mezo import update

    seeds = itertools.count(1_000_000 * seed)

    def step(loss: Loss) -> float:
        update(model, None, lambda *_: loss(), 1e-3, rate, next(seeds))
        return 0.0  # it returns the projected gradient alone

    return step


def zo_adam(model: nn.Module, rate: float, seed: int, optimizer: Any = torch.optim.Adam) -> Step:
    """`ZeroOrder` whose estimate is the gradient of a torch optimizer."""
    zo = ZeroOrder(model, optimizer=optimizer(moving(model), lr=rate), seed=seed, brake=None)
    zo.first_steps = None

    return lambda loss: float(zo.step(loss))


def at(rate: float, start: Start) -> Start:
    """The powers of 2 of a search are multiples of ``rate``."""
    return partial(_at, rate, start)


def _at(rate: float, start: Start, model: nn.Module, power: float, seed: int) -> Step:
    return start(model, rate * 2.0**power, seed)
