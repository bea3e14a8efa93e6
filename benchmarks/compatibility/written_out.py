"""What a trainer should measure and where its weights should be, in plain code: copies, sums and differences.

`WrittenOut` is a mixin for a trainer that does not use this package. It computes that trainer's own loss at
``theta + eps z`` and ``theta - eps z`` and moves the weights along z. It uses no engine; from the package it
needs only the values of z.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from zo_core import Noise, ZeroOrder

EPS, LR, SEED, STEPS = 1e-3, 1e-3, 3, 2
#: Where a slope is compared with autograd's: kinks and curvature are beyond it, float32 is still exact to 1e-3.
NEAR = 1e-4


@dataclass
class Run:
    """The results of a run.

    Attributes:
        grads: the projected gradient of each step.
        losses: the mean loss over the probes of each step.
        weights: everything that the trainer trains or that a forward changes, by name, at the end.
        keys: for each step, names of the slots by names of the tensors; of a run of this package.
        untrained: weights in the trainer's own optimizer that this package does not move.
        detached: how far the slope of the loss's value is from that of autograd, in units of the
            gradient's norm; only for a run in plain code.
    """

    grads: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    keys: list[dict[str, str]] = field(default_factory=list)
    untrained: list[str] = field(default_factory=list)
    detached: float = 0.0


class Case(Protocol):
    """One trainer with one setting, in both ways."""

    trainer: str
    setting: str
    remark: str

    def mine(self, **settings: Any) -> Run: ...

    def written_out(self, noise: str, keys: list[dict[str, str]]) -> Run: ...


def same_start() -> None:
    """All global generators as they are at the start of each run."""
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)


@contextmanager
def repeatable() -> Iterator[Callable[[], None]]:
    """Returns a function that restores the global generators."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def back() -> None:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])

    yield back


class Copies:
    """The loss of copies of some modules: a copy is their memory with other values, which are removed again.

    Args:
        roots: the modules.
        moved: the tensors that z moves, with the keys of their slots.
        noise: determines z.
        loss: runs the modules.
    """

    def __init__(self, roots: list[nn.Module], moved: dict[str, Tensor], noise: Noise, loss: Callable[[], Any]):
        self.roots, self.moved, self.noise, self.loss = roots, moved, noise, loss

    def everything(self) -> list[Tensor]:
        """All tensors that the modules have."""
        found = {id(t): t for root in self.roots for t in (*root.parameters(), *root.buffers())}
        return list(found.values())

    @torch.no_grad()
    def at(self, seed: int, scale: float) -> float:
        """The loss at ``theta + scale * z``; the modules are restored."""
        tensors = self.everything()
        before = [tensor.detach().clone() for tensor in tensors]
        try:
            for key, tensor in self.moved.items():
                tensor.add_(self.noise.values(seed, key, tensor.shape, scale=scale))
            with evaluating(self.roots):
                return float(torch.as_tensor(self.loss()).double())
        finally:
            for tensor, value in zip(tensors, before, strict=True):
                tensor.data.copy_(value)

    def both(self, seed: int) -> tuple[float, float]:
        """The losses on both sides, with the same random numbers; afterwards these are as after one of them."""
        with repeatable() as back:
            plus = self.at(seed, EPS)
            back()
            return plus, self.at(seed, -EPS)

    def slope(self, seed: int) -> float:
        """``|(L(theta + h z) - L(theta - h z)) / 2 h - autograd's slope| / |gradient|``; 0 without a gradient."""
        grads = self.gradients_of(self.moved)
        with repeatable() as back:
            plus = self.at(seed, NEAR)
            back()
            minus = self.at(seed, -NEAR)
            back()
        slope = sum(
            float((grad.double() * self.noise.values(seed, key, grad.shape)).sum()) for key, grad in grads.items()
        )
        norm = sum(float(grad.double().square().sum()) for grad in grads.values()) ** 0.5
        rounding = 4 * np.finfo(np.float32).eps * max(1.0, abs(plus)) / (2 * NEAR)
        return max(abs((plus - minus) / (2 * NEAR) - slope) - rounding, 0.0) / max(norm, 1e-3) if grads else 0.0

    def gradients_of(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The gradients by autograd, by the names of the tensors that get one; nothing else changes."""
        before = [tensor.detach().clone() for tensor in self.everything()]
        with repeatable() as back, torch.enable_grad():
            try:
                with evaluating(self.roots):
                    _backward(self.loss())
            except RuntimeError:  # some modules work in place in eval mode
                back()
                _backward(self.loss())
            back()
        found = {name: tensor.grad.clone() for name, tensor in tensors.items() if tensor.grad is not None}
        for tensor, value in zip(self.everything(), before, strict=True):
            tensor.data.copy_(value)
            tensor.grad = None
        return found


def _backward(loss: Any) -> None:
    if isinstance(loss, Tensor) and loss.requires_grad:
        loss.backward()


@contextmanager
def evaluating(roots: list[nn.Module]) -> Iterator[None]:
    """Eval mode for all but the first module itself, whose flag trainers read."""
    flags = {module: module.training for root in roots for module in root.modules()}
    for module in flags:
        module.training = False
    roots[0].training = flags[roots[0]]
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


def unwrapped(optimizer: Any) -> Any:
    """The torch optimizer inside of accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)


def names_of(roots: list[nn.Module]) -> dict[str, Tensor]:
    """All tensors of some modules by name; a tensor that comes twice has its first name."""
    found: dict[int, tuple[str, Tensor]] = {}
    for index, root in enumerate(roots):
        for name, tensor in (*root.named_parameters(), *root.named_buffers()):
            found.setdefault(id(tensor), (f"{index}.{name}", tensor))
    return dict(found.values())


def keys_of(zo: ZeroOrder, roots: list[nn.Module]) -> dict[str, str]:
    """The names of an engine's slots by the names of their tensors."""
    names = {id(tensor): name for name, tensor in names_of(roots).items()}
    return {names[id(slot.tensor)]: slot.key for slot in zo.slots if id(slot.tensor) in names}


def roots_of(trainer: Any) -> list[nn.Module]:
    """What a Hugging Face trainer trains: its model, and losses that may have weights of their own."""
    loss = getattr(trainer, "loss", None)
    losses = list(loss.values()) if isinstance(loss, dict) else [loss]
    return [trainer.model, *(each for each in losses if isinstance(each, nn.Module))]


class WrittenOut:
    """A mixin for Hugging Face trainers: each step in plain code, with the trainer's own ``compute_loss``."""

    noise: Noise
    keys: list[dict[str, str]]
    run: Run
    sums: tuple[float, float] = (0.0, 0.0)

    def training_step(self: Any, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        roots = roots_of(self)
        model.train()
        count = getattr(self, "_step", None)
        batch = self._prepare_inputs(inputs)
        rates = {id(t): group["lr"] for group in unwrapped(self.optimizer).param_groups for t in group["params"]}
        names = {name: tensor for name, tensor in names_of(roots).items() if id(tensor) in rates}
        keys = self.keys[self.state.global_step]
        moved = {keys[name]: t for name, t in names.items() if name in keys and t.requires_grad}

        def loss() -> Any:
            with self.compute_loss_context_manager():
                value = self.compute_loss(model, copy.copy(batch), num_items_in_batch=num_items_in_batch)
            scaled = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            if self.loss_is_scaled_for_ga or scaled or self.compute_loss_func is not None:
                return value
            return value / self.current_gradient_accumulation_steps

        seed = self.noise.seed(SEED, self.state.global_step, 0)
        copies = Copies(roots, moved, self.noise, loss)
        if not self.run.losses:
            self.run.detached = copies.slope(seed)
            gets_gradient = copies.gradients_of(names)
            self.run.untrained = [name for name in gets_gradient if name not in keys]
        losses = copies.both(seed)
        self.sums = self.sums[0] + losses[0], self.sums[1] + losses[1]
        if self.accelerator.sync_gradients:
            (plus, minus), self.sums = self.sums, (0.0, 0.0)
            grad = (plus - minus) / (2 * EPS)
            self.run.grads.append(grad)
            self.run.losses.append((plus + minus) / 2)
            for key, tensor in moved.items():
                scale = -rates[id(tensor)] * float(np.float32(grad))
                tensor.data.add_(self.noise.values(seed, key, tensor.shape, scale=scale))
        if count is not None and self._step == count:
            self._step += 1  # trainers that generate count their steps in training_step
        return torch.tensor(sum(losses) / 2)
