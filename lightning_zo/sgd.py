"""Runs the engine's own rules behind a `torch.optim.SGD`: updates in one pass, without gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from zo_core import Momentum, StateError, ZOOptimizer
from zo_core.checkpoint import check_state
from zo_core.noise import compute_dtype

BUFFER = "momentum_buffer"


def is_plain(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer is an SGD that the rules ``sgd`` and ``momentum`` can compute."""
    groups = optimizer.param_groups
    return (
        type(optimizer) is torch.optim.SGD
        and not any(group["nesterov"] or group["maximize"] or group["dampening"] for group in groups)
        and len({float(group["momentum"]) for group in groups}) == 1
    )


class SGDFace(ZOOptimizer):
    """A `ZOOptimizer` in front of an SGD, with the learning rate, weight decay and momentum of the SGD.

    The trainer, schedulers and callbacks still use the SGD, and checkpoints have its format. The SGD's
    own ``step`` finds no gradients and changes nothing; it is called because schedulers check for the call.

    Args:
        inner: the SGD.
        eps: distance of the probes from the weights.
    """

    def __init__(self, inner: torch.optim.Optimizer, eps: float):
        self.inner = inner
        groups = [{"params": list(group["params"]), "lr": group["lr"]} for group in inner.param_groups]
        super().__init__(groups, eps=eps)
        self.follow()

    @property
    def beta(self) -> float:
        """The momentum of the SGD."""
        return float(self.inner.param_groups[0]["momentum"])

    def follow(self) -> None:
        """Copies the SGD's hyperparameters, which a scheduler may have changed."""
        for mine, theirs in zip(self.param_groups, self.inner.param_groups, strict=True):
            mine["lr"], mine["weight_decay"] = theirs["lr"], theirs["weight_decay"]
        engine = self.engine
        if engine is not None and self.beta and isinstance(engine.rule, Momentum) and engine.rule.beta != self.beta:
            engine.flush()  # pending updates use the momentum of their own step
            engine.rule = replace(engine.rule, beta=self.beta)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        self.follow()
        record = super().step(closure)
        self.inner.step()
        return record

    def sgd_state_dict(self) -> dict[str, Any]:
        """Returns the state in the format of `torch.optim.SGD`, with our mark, which SGD ignores."""
        mine = self.state_dict()["state"]
        buffers = {index: {BUFFER: state["momentum"]} for index, state in mine.items() if "momentum" in state}
        return self._marked({**self.inner.state_dict(), "state": buffers})

    def load_sgd_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the result of `sgd_state_dict`; buffers keep the precision in which momentum is computed.

        Also accepts a state that an SGD wrote in a run with backpropagation.

        Raises:
            StateError: another optimizer or a run with other settings wrote the state; nothing was loaded.
        """
        check_state(state_dict, self.engine, "SGD")
        problems = self._window_problems(state_dict)
        if problems:
            raise StateError("; ".join(problems))
        self.inner.load_state_dict({**state_dict, "state": {}})
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, tensor in zip(ids, tensors, strict=True):
            buffer = state_dict["state"].get(index, {}).get(BUFFER)
            self.state.pop(tensor, None)
            if buffer is not None:
                wide = compute_dtype(tensor.dtype)
                self.state[tensor]["momentum"] = buffer.detach().to(tensor.device, wide, copy=True)
        self._load_extras(state_dict)
        self.follow()
