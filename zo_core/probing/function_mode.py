"""What a probe changes in calls of torch functions: float32 losses, and weights used outside their module's forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..stand_ins import METADATA

#: Functions whose half-precision inputs are upcast. Near 0.7 one unit in the last place of bf16 is
#: 0.004: a difference of two bf16 losses is noise, or exactly 0.
LOSS_FUNCTIONS = {
    F.cross_entropy,
    F.nll_loss,
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.kl_div,
    F.gaussian_nll_loss,
    F.poisson_nll_loss,
    F.cosine_embedding_loss,
    F.cosine_similarity,
    F.ctc_loss,
    F.hinge_embedding_loss,
    F.margin_ranking_loss,
    F.multi_margin_loss,
    F.multilabel_margin_loss,
    F.multilabel_soft_margin_loss,
    F.soft_margin_loss,
    F.triplet_margin_loss,
    F.triplet_margin_with_distance_loss,
    F.log_softmax,
    F.logsigmoid,
    torch.log_softmax,
    torch.logsumexp,
    Tensor.log_softmax,
    Tensor.logsumexp,
}

HALF = (torch.bfloat16, torch.float16)


def upcast(value: Any) -> Any:
    """The value, in float32 if it is a half-precision tensor."""
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value


class ProbeMode(TorchFunctionMode):
    """Active while a probe runs the closure.

    Args:
        absent: tensors without values at the moment, by ``id``; shared with the owner.
        serve: called with a key of ``absent`` when a function is about to use that tensor.
        notice: called when an input of a loss function is upcast.
    """

    def __init__(self, absent: dict[int, Any], serve: Callable[[int], None], notice: Callable[[], None]):
        super().__init__()
        self.absent, self.serve, self.notice = absent, serve, notice

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.absent and func not in METADATA:
            self._look_for_absent(args)
            if kwargs:
                self._look_for_absent(kwargs.values())
        if func in LOSS_FUNCTIONS:
            if any(isinstance(value, Tensor) and value.dtype in HALF for value in (*args, *kwargs.values())):
                self.notice()
            args = tuple(upcast(value) for value in args)
            kwargs = {name: upcast(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _look_for_absent(self, values: Any) -> None:
        for value in values:
            if isinstance(value, Tensor):
                if id(value) in self.absent:
                    self.serve(id(value))
            elif isinstance(value, (list, tuple)):
                self._look_for_absent(value)
