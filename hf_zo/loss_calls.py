"""Runs a trainer's own ``training_step`` while probes measure its loss.

``training_step`` runs once, at the unperturbed weights: it prepares the batch (and generates, draws noise, counts).
Its calls of ``compute_loss`` return a stand-in whose value is the measured loss. The gradient of what reaches
``accelerator.backward`` with respect to the stand-in gives the scale of the loss.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from zo_core import ConfigError

from .attributes import Attributes

#: Relative rounding error of float32 arithmetic between ``compute_loss`` and ``accelerator.backward``.
ROUNDING = 1e-5


class LossCall:
    """A call of ``compute_loss``, which each probe repeats.

    Args:
        trainer: the trainer; its plain attributes (counts of tokens, for example) start from the same values in
            each probe.
        compute_loss: the trainer's own method.
        arguments, keywords: arguments of the call.

    Attributes:
        found: the trainer's attributes at the time of the call.
        left: the trainer's attributes at the end of the last probe.
    """

    def __init__(
        self, trainer: Any, compute_loss: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]
    ):
        self.trainer, self.compute_loss = trainer, compute_loss
        self.arguments, self.keywords = arguments, keywords
        self.found = self.left = Attributes(trainer)
        self.value = torch.zeros((), device=trainer.args.device, requires_grad=True)
        self.scale = 0.0

    def loss(self) -> Any:
        """Runs one probe, on copies of the containers, because losses pop entries from their batch and write to it."""
        now = Attributes(self.trainer)
        self.found.put(self.trainer)
        try:
            loss = self.compute_loss(*map(_own, self.arguments), **{k: _own(v) for k, v in self.keywords.items()})
            self.left = Attributes(self.trainer)
        finally:
            now.put(self.trainer)
        return loss[0] if isinstance(loss, tuple) else loss

    def stand_in(self, value: Tensor) -> Tensor:
        """Returns the loss for ``training_step``: float32 of shape ``[]``, with the value ``value`` and a gradient."""
        with torch.no_grad():
            self.value.copy_(value)
        with torch.enable_grad():
            return self.value * 1.0  # not a leaf, so that it may be changed in place

    def scaled(self, loss: Tensor) -> Tensor:
        """Scales a loss, float64 of shape ``[]``, as ``training_step`` does: in float32 if its value is a float32."""
        single = loss.float()
        kept = single if bool(single.double() == loss) else loss
        divisor = 1.0 / self.scale
        whole = round(divisor)
        return (kept / whole if abs(divisor - whole) < ROUNDING * whole else kept * self.scale).double()


def _own(value: Any) -> Any:
    return value if isinstance(value, torch.nn.Module) else copy.copy(value)


class LossCalls:
    """The calls of ``compute_loss`` in one run of ``training_step``.

    Args:
        trainer: the trainer.
        measure: called for each of them; returns the value of the stand-in.
    """

    def __init__(self, trainer: Any, measure: Callable[[LossCall], Tensor]):
        self.trainer, self.measure = trainer, measure
        self.calls: list[LossCall] = []

    @contextmanager
    def answered(self) -> Iterator[None]:
        """A context in which the trainer's ``compute_loss`` returns stand-ins, and nothing is differentiated.

        Raises:
            ConfigError: ``training_step`` does not train on the results of ``compute_loss`` alone.
        """
        trainer = self.trainer
        own = vars(trainer).get("compute_loss")
        compute_loss = trainer.compute_loss

        def answer(*arguments: Any, return_outputs: bool = False, **keywords: Any) -> Any:
            call = LossCall(trainer, compute_loss, arguments, keywords)
            _put(trainer, "compute_loss", own)
            try:
                stand_in = call.stand_in(self.measure(call))
            finally:
                trainer.compute_loss = answer
            self.calls.append(call)
            return (stand_in, None) if return_outputs else stand_in

        trainer.compute_loss = answer
        trainer.accelerator.backward = self._receive
        try:
            yield
        finally:
            _put(trainer, "compute_loss", own)
            del trainer.accelerator.backward
        for call in self.calls:  # a direct ``loss.backward()``
            call.scale += 0.0 if call.value.grad is None else call.value.grad.item()
        if not any(call.scale for call in self.calls):
            raise self._elsewhere()

    def _elsewhere(self) -> ConfigError:
        return ConfigError(
            [
                f"training_step of {type(self.trainer).__name__} does not train on what its compute_loss returns, and "
                "only that can be measured with other weights; compute the loss in compute_loss(model, inputs)"
            ]
        )

    def _receive(self, loss: Tensor, **_: Any) -> None:
        """Replaces ``Accelerator.backward``: finds the scale of each loss."""
        if not self.calls:
            raise self._elsewhere()
        values = [call.value for call in self.calls]
        grads: tuple[Tensor | None, ...] = ()
        if isinstance(loss, Tensor) and loss.requires_grad and values:
            grads = torch.autograd.grad(loss, values, allow_unused=True)
        total = rest = float(loss.detach() if isinstance(loss, Tensor) else loss)
        for call, grad in zip(self.calls, grads, strict=False):
            call.scale += 0.0 if grad is None else grad.item()
            rest -= 0.0 if grad is None else grad.item() * call.value.item()
        if abs(rest) > ROUNDING * max(abs(total), 1e-3):
            raise ConfigError(
                [
                    f"training_step of {type(self.trainer).__name__} adds {rest:.4g} to the loss outside of its "
                    "compute_loss, and only what compute_loss returns can be measured with other weights; add it there"
                ]
            )


def _put(trainer: Any, name: str, own: Any) -> None:
    """Restores an attribute of the object; None removes it, so that the class's own is used."""
    if own is None:
        del vars(trainer)[name]
    else:
        setattr(trainer, name, own)


@contextmanager
def numbers_allowed(trainer: Any) -> Iterator[None]:
    """A context in which ``compute_loss`` may return a Python number, although Trainer's evaluation needs a tensor."""
    own, compute_loss = vars(trainer).get("compute_loss"), trainer.compute_loss

    def as_tensors(*arguments: Any, **keywords: Any) -> Any:
        found = compute_loss(*arguments, **keywords)
        loss = found[0] if isinstance(found, tuple) else found
        if isinstance(loss, Tensor) or loss is None:
            return found
        loss = torch.tensor(float(loss), device=trainer.args.device)
        return (loss, *found[1:]) if isinstance(found, tuple) else loss

    trainer.compute_loss = as_tensors
    try:
        yield
    finally:
        _put(trainer, "compute_loss", own)
