"""Low-rank directions whose right factor lies along the inputs of the layers, new in each window: an experiment.

The inputs are those of one batch (AGZO, arXiv 2601.17261). `hf_zo.activation_adapter` keeps such directions for a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_zo.activations import FOLLOWED, Sketch, basis
from zo_core import LowRank, ZeroOrder


@dataclass(frozen=True)
class Along(LowRank):
    """Low-rank noise with V along the inputs of linear layers; other matrices have signs, as usual.

    Attributes:
        whiten: power of the singular value that a direction is divided by.
        found: V of the current window by slot, and of each window by its basis and slot.
    """

    whiten: float = 1.0
    found: dict[Any, Tensor | None] = field(default_factory=dict, compare=False)

    def look(self, zo: ZeroOrder, closure: Callable[[], Any]) -> None:
        """At the first step of a window, runs the unperturbed model to find V."""
        if zo.step_count % (self.refresh or zo.step_count + 1):
            return
        if zo.step_count == 0:
            self.found.clear()  # of an earlier run
        slots = {id(tensor): slot for slot in zo.slots for tensor in slot.tensors}
        layers = [m for m in zo.model.modules() if isinstance(m, nn.Linear) and id(m.weight) in slots]
        handles = [m.register_forward_pre_hook(partial(self._see, slots[id(m.weight)].key)) for m in layers]
        with torch.no_grad():
            closure()
        for handle in handles:
            handle.remove()

    def _see(self, slot: str, layer: Any, inputs: tuple[Tensor, ...]) -> None:
        sketch = Sketch(FOLLOWED * self.rank)
        sketch.see(inputs[0].flatten(0, -2))
        assert sketch.rows is not None
        self.found[slot] = basis(sketch.rows, self.rank, layer.in_features, self.whiten)

    def rights(self, bases: tuple[int, ...], slot: str, shape: torch.Size, device: torch.device) -> Tensor:
        if slot not in self.found:
            return super().rights(bases, slot, shape, device)
        parts = [self.found.setdefault((one, slot), self.found[slot]) for one in bases]
        return torch.cat([part for part in parts if part is not None])
