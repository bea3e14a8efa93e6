"""Adapters along the principal directions of the layers' inputs, where the gradient of a linear layer lies (AGZO)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zo_core import ConfigError, ModelError
from zo_core.modes import eval_mode

from .low_rank import frozen_adapter, set_signs

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)

#: Rows of a batch that a layer looks at; more of them are thinned out evenly.
ROWS = 256
#: Directions that are followed from batch to batch, for each that is kept.
FOLLOWED = 4
#: Directions with a smaller share of the largest singular value are taken for rounding.
LEAST = 1e-5


class Sketch:
    """The leading principal directions of rows that come in batches, about the origin, in little memory.

    Attributes:
        size: how many directions are followed.
        rows: singular values times directions, largest first: float32 ``[at most size, columns]``.
    """

    def __init__(self, size: int):
        self.size = size
        self.rows: Tensor | None = None

    def see(self, rows: Tensor) -> None:
        """Takes in rows ``[count, columns]``; of more than `ROWS` of them, evenly spaced ones."""
        rows = rows[:: max(1, -(-len(rows) // ROWS))].to(torch.float32)
        if self.rows is not None:
            rows = torch.cat([self.rows, rows])
        wide = rows.to(torch.float64)
        _, turn = torch.linalg.eigh(wide @ wide.T)
        self.rows = (turn.T.flip(0)[: self.size] @ wide).to(torch.float32)


def activation_adapter(
    model: nn.Module,
    batches: Iterable[Any],
    rank: int = 8,
    *,
    whiten: float = 1.0,
    target_modules: str | list[str] = "all-linear",
    **config: Any,
) -> PeftModel:
    """Adds LoRA adapters that can only change how a layer answers to the directions that its inputs really have.

    Each linear layer gets an adapter ``B A / sqrt(rank)``. The rows of A are the principal directions of the layer's
    inputs over a few batches, each divided by its singular value, and stay frozen; B is zero and trained. The
    gradient of a linear layer is a sum of (gradient of its output) times (its input), so that a part of it that random
    directions of that number would miss lies in their span (AGZO, arXiv 2601.17261). Finding them takes forwards only.

    A is scaled so that a unit of noise in B changes a weight by a unit (root mean square), whatever rank and layer.

    Args:
        model: the base model, changed in place: PEFT wraps its layers. It may be quantised or streamed.
        batches: a few batches of the training data: dicts for ``model(**batch)``, or what ``model(batch)`` takes.
            Where a dict has an ``attention_mask``, tokens that it masks do not count.
        rank: directions per layer, at least 1.
        whiten: power of the singular value that a direction is divided by; 0 leaves all of them as long as each other.
        target_modules: the layers, as in PEFT's ``LoraConfig``; by default all linear ones except the head of a
            language model.
        **config: other fields of ``LoraConfig``, for example ``task_type="CAUSAL_LM"``.

    Returns:
        The model with adapters, for `ZOTrainer` or `ZeroOrder`. ``save_pretrained`` writes an ordinary adapter.

    Raises:
        ConfigError: an argument is not valid, there are no batches, or layers are not linear.
        ModelError: the model already has adapters, or an input of a layer is not finite.
    """
    problems = []
    if isinstance(whiten, bool) or not isinstance(whiten, int | float) or not 0.0 <= whiten <= 1.0:
        problems.append(f"whiten={whiten!r} must be a number from 0 to 1, for example 1.0")
    kept = [batches] if isinstance(batches, Mapping | Tensor) else list(batches)
    if not kept:
        problems.append("batches is empty; pass a few batches of the training data, for example [next(iter(loader))]")
    if problems:
        raise ConfigError(problems)
    trainable = [p for p in model.parameters() if p.requires_grad]
    adapted, layers = frozen_adapter(model, rank, target_modules, config, "activation_adapter")
    try:
        found = principal(adapted, layers, kept, FOLLOWED * rank)
    except BaseException:
        adapted.unload()
        for parameter in trainable:
            parameter.requires_grad_(True)
        raise
    for name, rows in found.items():
        down: Any = layers[name].lora_A["default"].weight
        with torch.no_grad():
            down.copy_(basis(rows, rank, down.shape[1], whiten))
    if unseen := {name: layer for name, layer in layers.items() if name not in found}:
        set_signs(unseen, rank, 0)
        logger.warning(
            "%d of %d layers did not run on these batches and have random directions: %s",
            len(unseen),
            len(layers),
            ", ".join(sorted(unseen)[:3]) + (", ..." if len(unseen) > 3 else ""),
        )
    return adapted


def principal(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any], size: int
) -> dict[str, Tensor]:
    """The principal directions of the inputs of layers, times their singular values: ``[size, columns]`` for each.

    Layers that do not run, or only on no rows, are left out.

    Raises:
        ModelError: an input is not finite.
    """
    sketches: dict[str, Sketch] = {}
    keep: Tensor | None = None

    def look(name: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        rows = inputs[0].detach()
        if keep is not None and rows.shape[:-1] == keep.shape:
            rows = rows[keep.to(rows.device)]
        rows = rows.reshape(-1, rows.shape[-1])
        if not rows.isfinite().all():
            raise ModelError(f"an input of {name} is not finite, so it has no principal directions; look at this batch")
        if len(rows):
            sketches.setdefault(name, Sketch(size)).see(rows)

    with ExitStack() as stack, torch.no_grad(), eval_mode(model), torch.random.fork_rng():
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(partial(look, name)).remove)
        for batch in batches:
            keep = None
            if isinstance(batch, Mapping):
                if batch.get("attention_mask") is not None:
                    keep = batch["attention_mask"].bool()
                model(**batch)
            else:
                model(batch)
    return {name: sketch.rows for name, sketch in sketches.items() if sketch.rows is not None}


def basis(rows: Tensor, rank: int, columns: int, whiten: float) -> Tensor:
    """A ``[rank, columns]`` from rows of `principal`; the mean square of its elements is 1.

    Directions that the inputs do not have are zero.
    """
    values = torch.linalg.vector_norm(rows[:rank], dim=1, keepdim=True)
    found = int((values > LEAST * values[0]).sum())
    result = rows.new_zeros(rank, columns)
    if found:
        result[:found] = rows[:found] * (values[:found] / values[0]) ** (-1.0 - whiten)
        result *= (rank * columns) ** 0.5 / torch.linalg.vector_norm(result)
    return result
